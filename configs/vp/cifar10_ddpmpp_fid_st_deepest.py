"""CIFAR-10, wide and deep DDPM++, mixed objective, soft truncation, for samples."""

from ml_collections import ConfigDict

from configs.vp import cifar10_ddpmpp_nll_st_deepest


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_ddpmpp_nll_st_deepest.get_config()
    config.training.update(k=0.9, balanced=False, ddpm_weight=100.0)
    return config
