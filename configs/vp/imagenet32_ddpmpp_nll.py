"""ImageNet 32, DDPM++, likelihood weighting, fixed truncation."""

from ml_collections import ConfigDict

from configs.vp import imagenet32_ddpmpp_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = imagenet32_ddpmpp_st.get_config()
    config.training.update(truncation="fixed", truncation_time=5e-5)
    return config
