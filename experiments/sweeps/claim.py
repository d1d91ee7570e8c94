"""The paper's claim on images of 256 levels: the points that its sweeps share.

For the noise and for the velocity as what the network predicts: fixed truncation at four ε, soft
truncation by its exponent k and by the ε it starts from, its equivalent weight, and the sigmoid
prior; all with likelihood weighting and stratified, importance-sampled times. With the velocity
also without stratified times, and without clipping of gradients.

The images are in folders that `experiments.make_data` makes: the classifier of the samples' scores
is trained on images that no diffusion model sees.
"""

from typing import Any

from configs.vp import folder_st
from experiments.sweep import Evaluation, Sweep

_EPSILONS = {"1e-2": 1e-2, "1e-3": 1e-3, "1e-4": 1e-4, "1e-5": 1e-5}
_BITS = ("nll", "nll_stderr", "nelbo", "nelbo_stderr")
_EVALUATIONS = (
    Evaluation({"data.path": "{data}/features", "eval.enable_bpd": False}),
    Evaluation({"eval.images": "{data}/validation"}, "validation_", _BITS),
    Evaluation({"eval.images": "test"}),
)


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


def get_points() -> dict[str, dict[str, Any]]:
    """All points: {name: overrides}."""
    points = {
        f"{parametrization}_{truncation}": {"model.parametrization": parametrization, **overrides}
        for truncation, overrides in _get_truncations().items()
        for parametrization in ("noise", "velocity")
    }
    # Compared with velocity_soft_k1: what stratified times give.
    points["velocity_soft_k1_independent"] = {
        "model.parametrization": "velocity",
        "training.stratified_times": False,
    }
    # Clipped to a norm, the gradient of a drawn τ is no longer on average that of the weight.
    for truncation in ("fixed_1e-5", "soft_k1", "weight_k1"):
        point = f"velocity_{truncation}"
        points[f"{point}_unclipped"] = points[point] | {"optim.grad_clip": -1.0}
    return points


def get_claim(name: str, image_size: int = 16, num_images: int = 256) -> Sweep:
    """The sweep of the claim, with a network for a CPU, which trains for 2,000 steps of 32 images.

    Args:
      name: the sweep's name.
      image_size: of the folders' images.
      num_images: the number of test images for NLL and NELBO.
    """
    config = folder_st.get_config()
    config.data.image_size = image_size
    config.model.update(nf=16, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,))
    config.model.update(dropout=0.0, ema_rate=0.995)
    config.optim.update(lr=2e-3, warmup=100)
    config.training.update(truncation="soft", stratified_times=True, batch_size=32, n_iters=2000)
    config.training.update(log_freq=50, eval_freq=500, snapshot_freq=2000)
    config.training.update(snapshot_freq_for_preemption=500, snapshot_sampling=False)
    config.sampling.update(method="dpm_solver", num_steps=12, truncation_time=1e-3)
    config.eval.update(enable_fid=False, batch_size=128, sampling_batch_size=500)
    config.eval.update(num_samples=10_000, num_test_data=num_images, nll_steps=32, nelbo_draws=16)
    config.data.path = "{data}/training"
    return Sweep(name, config, get_points(), evaluations=_EVALUATIONS)
