"""CelebA 64, DDPM++ with the unbounded parametrisation, variance weighting, fixed truncation."""

from ml_collections import ConfigDict

from configs.vp import celeba_ddpmpp_nll_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = celeba_ddpmpp_nll_st.get_config()
    config.training.update(
        truncation="fixed",
        likelihood_weighting=False,
        importance_sampling=False,
        unbounded_parametrization=True,
    )
    return config
