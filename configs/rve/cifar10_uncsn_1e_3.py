"""CIFAR-10, UNCSN++ on the RVE SDE, fixed truncation, σ_min = 1e-3."""

from ml_collections import ConfigDict

from configs.rve import cifar10_uncsnpp_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_uncsnpp_st.get_config()
    config.training.truncation = "fixed"
    return config
