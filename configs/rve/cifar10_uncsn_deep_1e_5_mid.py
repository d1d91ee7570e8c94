"""CIFAR-10, deep UNCSN++ on the RVE SDE, fixed truncation, σ_min = 1e-5.

Equal to cifar10_uncsn_deep_1e_5: what the official file's `threshold` did was never released.
"""

from ml_collections import ConfigDict

from configs.rve import cifar10_uncsn_deep_1e_5


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_uncsn_deep_1e_5.get_config()
    return config
