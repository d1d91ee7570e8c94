"""CIFAR-10, DDPM++ with soft truncation: the official ddpmpp_nll_st recipe (arXiv 2106.05527).

The official release says likelihood_weighting=False beside importance_sampling=True, since its
importance sampling already is that of the likelihood weighting; here the field says so.
"""

from ml_collections import ConfigDict

from configs.default import get_default_config


def get_config() -> ConfigDict:
    """The recipe."""
    config = get_default_config()
    config.data.dequantization = "none"
    config.training.update(
        n_iters=13_000_001, eval_freq=100, snapshot_freq=100_000, snapshot_sampling=False
    )
    config.sampling.update(method="ode", batch_size=1024)
    return config
