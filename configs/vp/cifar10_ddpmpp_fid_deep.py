"""CIFAR-10, deep DDPM++, variance weighting, fixed truncation."""

from ml_collections import ConfigDict

from configs.vp import cifar10_ddpmpp_nll_deep


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_ddpmpp_nll_deep.get_config()
    config.training.update(likelihood_weighting=False, importance_sampling=False)
    return config
