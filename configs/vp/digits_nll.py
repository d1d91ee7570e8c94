"""The digits with one fixed truncation: what soft truncation is compared with."""

from ml_collections import ConfigDict

from configs.vp import digits_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = digits_st.get_config()
    config.training.truncation = "fixed"
    return config
