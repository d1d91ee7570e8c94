"""CIFAR-10, deep DDPM++, likelihood weighting, soft truncation."""

from ml_collections import ConfigDict

from configs.vp import cifar10_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_st.get_config()
    config.model.num_res_blocks = 8
    return config
