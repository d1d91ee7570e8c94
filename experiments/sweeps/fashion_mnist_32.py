"""The claim on Fashion-MNIST padded to 32×32, for a GPU.

`python -m experiments.make_data fashion_mnist DIR --size 32` makes the images.
"""

import dataclasses

from experiments.sweep import Sweep
from experiments.sweeps.claim import get_claim


def get_sweep() -> Sweep:
    """The sweep, of 2,000 steps."""
    sweep = get_claim("fashion_mnist_32", image_size=32, num_images=2048)
    sweep.config.data.update(num_channels=1, random_flip=False)
    sweep.config.model.nf = 32
    sweep.config.training.batch_size = 128
    return sweep


def get_longer(name: str, times: int) -> Sweep:
    """The sweep of `times` as many steps, with the EMA over the same share of them."""
    sweep = get_sweep()
    config, n_iters = sweep.config, times * sweep.config.training.n_iters
    config.training.update(n_iters=n_iters, snapshot_freq=n_iters)
    config.training.update(eval_freq=2000, snapshot_freq_for_preemption=2000)
    config.model.ema_rate = 1 - (1 - config.model.ema_rate) / times
    config.eval.num_test_data = 256
    return dataclasses.replace(sweep, name=name)
