"""CIFAR-10, deep UNCSN++ on the RVE SDE, fixed truncation, σ_min = 1e-5."""

from ml_collections import ConfigDict

from configs.rve import cifar10_uncsnpp_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_uncsnpp_st.get_config()
    config.model.update(num_res_blocks=8, sigma_min=1e-5)
    config.training.truncation = "fixed"
    return config
