"""The claim on Fashion-MNIST at 32×32 after sixteen times as many steps, for a GPU."""

from experiments import claim_fashion_mnist_long
from experiments.sweep import Sweep


def get_sweep() -> Sweep:
    """The sweep."""
    return claim_fashion_mnist_long.get_sweep("longest", times=16)
