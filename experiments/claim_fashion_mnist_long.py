"""The claim on Fashion-MNIST at 32×32 after four times as many steps, to train on a GPU.

The EMA is over the same share of the steps; the same folders of images as claim_fashion_mnist.py.
"""

import dataclasses

from experiments.claim_fashion_mnist import get_sweep_at
from experiments.sweep import Sweep


def get_sweep(length: str = "long", times: int = 4) -> Sweep:
    """The sweep, of `times` as many steps; `length` ends its name."""
    sweep = get_sweep_at(32)
    config = sweep.config
    n_iters = times * config.training.n_iters
    config.training.update(
        n_iters=n_iters, eval_freq=2000, snapshot_freq=n_iters, snapshot_freq_for_preemption=2000
    )
    config.model.ema_rate = 1 - (1 - config.model.ema_rate) / times
    config.eval.num_test_data = 256
    return dataclasses.replace(sweep, name=f"{sweep.name}_{length}")
