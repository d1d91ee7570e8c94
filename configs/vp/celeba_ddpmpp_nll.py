"""CelebA 64, DDPM++, likelihood weighting, fixed truncation."""

from ml_collections import ConfigDict

from configs.vp import celeba_ddpmpp_nll_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = celeba_ddpmpp_nll_st.get_config()
    config.training.truncation = "fixed"
    return config
