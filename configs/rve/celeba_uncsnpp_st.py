"""CelebA 64, UNCSN++ on the RVE SDE, soft truncation."""

from ml_collections import ConfigDict

from configs.ve import celeba_ncsnpp_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = celeba_ncsnpp_st.get_config()
    config.model.sigma_min = 0.001
    # Uniform 1/t, which is how the release draws t here, is importance sampling of λ = g².
    config.training.update(
        sde="reciprocal_vesde", likelihood_weighting=True, importance_sampling=True
    )
    return config
