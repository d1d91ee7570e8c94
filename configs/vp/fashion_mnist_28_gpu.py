"""Fashion-MNIST at 28×28 for bits per dimension: a wider network, for minutes of one large GPU.

It has not been trained. It is `fashion_mnist_28` with four times the channels, in bfloat16.
"""

from ml_collections import ConfigDict

from configs.vp import fashion_mnist_28


def get_config() -> ConfigDict:
    """The recipe."""
    config = fashion_mnist_28.get_config()
    config.model.update(nf=64, dtype="bfloat16")
    config.optim.update(lr=1e-3, warmup=1000)
    config.training.update(
        batch_size=128,
        n_iters=30_000,
        snapshot_freq=10_000,
        snapshot_freq_for_preemption=5000,
    )
    return config
