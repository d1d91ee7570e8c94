"""The claim on Fashion-MNIST at 32×32 after 32,000 steps, for a GPU."""

from experiments.sweep import Sweep
from experiments.sweeps import fashion_mnist_32


def get_sweep() -> Sweep:
    """The sweep."""
    return fashion_mnist_32.get_longer("fashion_mnist_32_32k", times=16)
