"""The digits on the RVE SDE, with a small UNCSN++: soft truncation."""

from ml_collections import ConfigDict

from configs.ve import digits_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = digits_st.get_config()
    config.training.sde = "reciprocal_vesde"
    config.sampling.truncation_time = 1e-5
    return config
