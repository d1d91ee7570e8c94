"""What the digits' recipe should be: noise or velocity, stratified times or not; for a CPU."""

from experiments import digits
from experiments.sweep import Sweep


def get_sweep() -> Sweep:
    """The sweep, with the base config of `experiments.digits` and soft truncation."""
    config = digits.get_sweep().config
    points = {
        f"{parametrization}{'_stratified' if stratified else ''}": {
            "model.parametrization": parametrization,
            "training.stratified_times": stratified,
        }
        for parametrization in ("noise", "velocity")
        for stratified in (False, True)
    }
    return Sweep("parametrisations", config, points, seeds=(0, 1, 2))
