"""CIFAR-10, DDPM++, likelihood weighting, fixed truncation."""

from ml_collections import ConfigDict

from configs.vp import cifar10_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_st.get_config()
    config.training.truncation = "fixed"
    return config
