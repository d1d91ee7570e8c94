"""Loads the data set that a config names."""

from ml_collections import ConfigDict

from configs.data import data_spec
from data.batches import Data, Dataset
from data.loading import load


def load_data(config: ConfigDict) -> Data:
    """The training and test split of `config.data.dataset`.

    Raises:
      UserError: the data are missing, can't be read, or do not fit the config.
    """
    return load(data_spec(config))


def get_dataset(config: ConfigDict, split: str) -> Dataset:
    """The `train` or `test` split of `load_data`."""
    return getattr(load_data(config), split)
