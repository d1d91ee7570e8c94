"""CIFAR-10, deep DDPM++, likelihood weighting, fixed truncation."""

from ml_collections import ConfigDict

from configs.vp import cifar10_st


def get_config() -> ConfigDict:
    """The recipe."""
    config = cifar10_st.get_config()
    config.model.num_res_blocks = 8
    config.training.truncation = "fixed"
    config.sampling.batch_size = 512
    config.eval.batch_size = 100
    return config
