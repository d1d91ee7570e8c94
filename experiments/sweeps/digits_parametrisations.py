"""What the digits' recipe should be: noise or velocity, stratified times or not; for a CPU."""

from experiments.sweep import Sweep
from experiments.sweeps import digits


def get_sweep() -> Sweep:
    """The sweep, with the base config of the sweep `digits` and soft truncation."""
    points = {
        f"{parametrization}{'_stratified' if stratified else ''}": {
            "model.parametrization": parametrization,
            "training.stratified_times": stratified,
        }
        for parametrization in ("noise", "velocity")
        for stratified in (False, True)
    }
    return Sweep("digits_parametrisations", digits.get_base(), points)
