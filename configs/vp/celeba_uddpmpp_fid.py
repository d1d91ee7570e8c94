"""CelebA 64, DDPM++ with the unbounded parametrisation, variance weighting, fixed truncation."""

from ml_collections import ConfigDict

from configs.vp import celeba_ddpmpp_fid


def get_config() -> ConfigDict:
    """The recipe."""
    config = celeba_ddpmpp_fid.get_config()
    config.training.unbounded_parametrization = True
    return config
