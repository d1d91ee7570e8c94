"""The claim on Fashion-MNIST after four times as many steps as claim_fashion_mnist.py takes.

The EMA is over the same share of the steps. For a GPU; the same folders of images.
"""

import dataclasses

from experiments import claim_fashion_mnist
from experiments.sweep import Sweep

_TIMES = 4


def get_sweep() -> Sweep:
    """The sweep."""
    sweep = claim_fashion_mnist.get_sweep()
    config = sweep.config
    n_iters = _TIMES * config.training.n_iters
    config.training.update(
        n_iters=n_iters, eval_freq=2000, snapshot_freq=n_iters, snapshot_freq_for_preemption=2000
    )
    config.model.ema_rate = 1 - (1 - config.model.ema_rate) / _TIMES
    return dataclasses.replace(sweep, name=f"{sweep.name}_long")
