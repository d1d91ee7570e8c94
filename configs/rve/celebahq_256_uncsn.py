"""CelebA-HQ 256, UNCSN++ on the RVE SDE, fixed truncation."""

from ml_collections import ConfigDict

from configs.rve import church_uncsn


def get_config() -> ConfigDict:
    """The recipe."""
    config = church_uncsn.get_config()
    config.data.update(dataset="CelebAHQ", category="")
    config.model.sigma_max = 348.0
    return config
