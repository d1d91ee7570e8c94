"""CelebA-HQ 256, NCSN++ on the VE SDE, variance weighting, soft truncation."""

from ml_collections import ConfigDict

from configs.rve import celebahq_256_uncsn


def get_config() -> ConfigDict:
    """The recipe."""
    config = celebahq_256_uncsn.get_config()
    config.model.sigma_min = 0.01
    config.training.update(
        sde="vesde", likelihood_weighting=False, importance_sampling=False, truncation="soft"
    )
    config.sampling.truncation_time = 0.001
    return config
