"""The claim on 16×16 crops of photographs, for a CPU: eight minutes a run on one core.

`python -m experiments.make_data photographs DIR PHOTOGRAPHS…` makes the crops.
"""

from experiments.sweep import Sweep
from experiments.sweeps.claim import get_claim


def get_sweep() -> Sweep:
    """The sweep."""
    return get_claim("photographs_16")
