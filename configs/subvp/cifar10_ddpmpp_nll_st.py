"""CIFAR-10, DDPM++ on the sub-VP SDE, likelihood weighting, soft truncation (ours)."""

from ml_collections import ConfigDict

from configs.vp import cifar10_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_st.get_config()
    config.training.sde = "subvpsde"
    return config
