"""FFHQ 256, UNCSN++ on the RVE SDE, fixed truncation."""

from ml_collections import ConfigDict

from configs.rve import celebahq_256_uncsn


def get_config() -> ConfigDict:
    """The recipe."""
    config = celebahq_256_uncsn.get_config()
    config.data.update(dataset="FFHQ", tfrecords_path="ffhq-r08.tfrecords")
    return config
