"""ImageNet 32, DDPM++, likelihood weighting, fixed truncation."""

from ml_collections import ConfigDict

from configs.vp import cifar10_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_st.get_config()
    config.data.dataset = "IMAGENET32"
    config.model.dropout = 0.0
    config.training.update(truncation="fixed", truncation_time=5e-05)
    config.eval.num_test_data = 49_999
    return config
