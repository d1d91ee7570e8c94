"""The paper's claim on images of 256 levels: the points of its sweeps.

For the noise and for the velocity as what the network predicts: fixed truncation at four ε, soft
truncation by its exponent k and by the ε it starts from, its equivalent weight, and the sigmoid
prior; all with likelihood weighting and stratified, importance-sampled times. With the velocity
also without stratified times, and without clipping of gradients. The points that decide have three
seeds, the others one.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.sweep import Sweep

# Beside the fixed ε whose NLL on validation images is the best, these have three seeds.
_DECIDING = ("soft_k1", "weight_k1", "sigmoid")
_EPSILONS = {"1e-2": 1e-2, "1e-3": 1e-3, "1e-4": 1e-4, "1e-5": 1e-5}


def _get_truncations() -> dict[str, dict[str, Any]]:
    """{name: overrides} of the truncations, for a base config with ε = 1e-5."""
    points: dict[str, dict[str, Any]] = {}
    for name, eps in _EPSILONS.items():
        at = {"training.truncation_time": eps, "sampling.truncation_time": max(eps, 1e-3)}
        points[f"fixed_{name}"] = {"training.truncation": "fixed", **at}
        if name != "1e-5":
            points[f"soft_k1_from_{name}"] = {"training.k": 1.0, **at}
    for k in (0.8, 1.0, 1.2):
        points[f"soft_k{k:g}"] = {"training.k": k}
    for k in (1.0, 1.2, 1.5):
        points[f"weight_k{k:g}"] = {"training.truncation": "equivalent_weight", "training.k": k}
    points["sigmoid"] = {"training.prior": "sigmoid"}
    return points


def get_claim(
    name: str,
    base: ConfigDict,
    best: dict[str, tuple[str, ...]],
    num_images: int,
    batch_size: int = 32,
    n_iters: int = 2000,
) -> Sweep:
    """The sweep of the claim.

    Args:
      name: the sweep's name.
      base: the data and the size of the network.
      best: the fixed truncations of the best validation NLL, for each parametrization.
      num_images: the number of images for NLL and NELBO.
      batch_size, n_iters: of training.
    """
    base.optim.update(lr=2e-3, warmup=100)
    base.training.update(
        truncation="soft",
        stratified_times=True,
        batch_size=batch_size,
        n_iters=n_iters,
        log_freq=50,
        eval_freq=500,
        snapshot_freq=n_iters,
        snapshot_freq_for_preemption=500,
        snapshot_sampling=False,
    )
    base.sampling.update(method="dpm_solver", num_steps=12, truncation_time=1e-3)
    base.eval.update(
        enable_fid=False,
        batch_size=128,
        sampling_batch_size=500,
        num_samples=10_000,
        num_test_data=num_images,
        nll_steps=32,
        nelbo_draws=16,
    )
    points = {
        f"{parametrization}_{truncation}": {"model.parametrization": parametrization, **overrides}
        for truncation, overrides in _get_truncations().items()
        for parametrization in ("noise", "velocity")
    }
    # Against velocity_soft_k1, what stratified times give.
    points["velocity_soft_k1_independent"] = {
        "model.parametrization": "velocity",
        "training.stratified_times": False,
    }
    # Clipped to a norm, the gradient of a drawn τ is no longer on average that of the weight.
    for truncation in ("fixed_1e-5", "soft_k1", "weight_k1"):
        point = f"velocity_{truncation}"
        points[f"{point}_unclipped"] = points[point] | {"optim.grad_clip": -1.0}
    deciding = ["velocity_soft_k1_independent", "velocity_weight_k1.2"]
    deciding += [
        f"{parametrization}_{truncation}"
        for parametrization, fixed in best.items()
        for truncation in (*_DECIDING, *fixed)
    ]
    return Sweep(name, base, points, (0, 1, 2), tuple(deciding), prepared=True)
