"""The claim on Fashion-MNIST at 16×16, for a CPU: eight minutes a run on one core.

`python -m experiments.make_data fashion_mnist DIR` makes the images.
"""

from experiments.sweep import Sweep
from experiments.sweeps.claim import get_claim


def get_sweep() -> Sweep:
    """The sweep."""
    sweep = get_claim("fashion_mnist_16")
    # All shoes point to the left, in training and test images.
    sweep.config.data.update(num_channels=1, random_flip=False)
    return sweep
