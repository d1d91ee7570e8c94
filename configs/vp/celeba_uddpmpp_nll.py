"""CelebA 64, DDPM++ with the unbounded parametrisation, likelihood weighting, fixed truncation."""

from ml_collections import ConfigDict

from configs.vp import celeba_ddpmpp_nll


def get_config() -> ConfigDict:
    """The recipe."""
    config = celeba_ddpmpp_nll.get_config()
    config.training.unbounded_parametrization = True
    return config
