"""CIFAR-10, deep UNCSN++ on the RVE SDE, fixed truncation, σ_min = 1e-3."""

from ml_collections import ConfigDict

from configs.rve import cifar10_uncsn_1e_3


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_uncsn_1e_3.get_config()
    config.model.num_res_blocks = 8
    return config
