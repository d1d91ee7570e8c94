"""The paper's claim on scikit-learn's 8×8 digits, for a CPU: 20 points, 1 to 2 minutes a run.

**Likelihood** is evaluated at each run's own `training.truncation_time` ε, the smallest time of its
training; below ε a network would extrapolate. With the residual, NLL and NELBO bound the likelihood
of the same images for every ε, so they are comparable between runs with different ε. NLL is
computed with a fixed number of steps, because the error of an adaptive solver at a loose tolerance
(0.01 to 0.02 bits/dim) differs between networks and would look like a difference of the networks.

**Samples** are drawn by the same sampler with the same number of evaluations for all runs, since
the claim is about what the networks have learnt. It stops at t = 1e-3, where σ is about 0.01 for VP
and for VE, so that training at smaller times affects only the likelihood. The run with fixed
ε = 1e-2 stops at 1e-2, the end of its training. All samples end with one denoising step. For RVE,
t = 1e-3 is still pure noise; its sampler stops at ε, where σ is 0.01 as well. Sub-VP's σ at 1e-3 is
1e-4, so samples are only comparable within an SDE.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.vp import digits_st
from experiments.sweep import Sweep

_EPSILONS = {"1e-2": 1e-2, "1e-3": 1e-3, "1e-4": 1e-4, "1e-5": 1e-5}
_EXPLODING = {
    "data.centered": False,
    "model.embedding_type": "fourier",
    "model.fourier_scale": 1.0,  # as in configs/ve/digits_st.py
    "model.fir": True,
    "model.progressive_input": "residual",
    "model.scale_by_sigma": True,
    "model.sigma_max": 5.0,  # about the largest distance of two images in [0, 1]
}
# {family: (k of its recipes, overrides)}
_FAMILIES: dict[str, tuple[float, dict[str, Any]]] = {
    "vp_variance": (
        1.0,
        {"training.likelihood_weighting": False, "training.importance_sampling": False},
    ),
    "ve": (2.0, {**_EXPLODING, "training.sde": "vesde"}),
    "rve": (
        2.0,
        {
            **_EXPLODING,
            "training.sde": "reciprocal_vesde",
            "sampling.truncation_time": 1e-5,
        },
    ),
    "subvp": (1.0, {"training.sde": "subvpsde"}),
}


def get_base() -> ConfigDict:
    """The base config; ε is 1e-5, with likelihood weighting and importance sampling."""
    config = digits_st.get_config()
    config.model.update(nf=16, ch_mult=(1, 2), parametrization="noise")
    config.optim.lr = 2e-3
    config.training.update(stratified_times=False, n_iters=1000, log_freq=20, eval_freq=1000)
    config.training.update(snapshot_freq=1000, snapshot_freq_for_preemption=500)
    config.training.snapshot_sampling = False
    config.sampling.update(method="dpm_solver", num_steps=20, truncation_time=1e-3)
    config.sampling.update(batch_size=64, n_images=64)
    config.eval.update(num_samples=10_000, nelbo_draws=32, nll_steps=64)
    return config


def get_sweep() -> Sweep:
    """The sweep: ε, k, the equivalent weight, and soft truncation on and off for each SDE."""
    fixed, soft = {"training.truncation": "fixed"}, {"training.truncation": "soft"}
    points: dict[str, dict[str, Any]] = {}
    for name, eps in _EPSILONS.items():
        at = {"training.truncation_time": eps, "sampling.truncation_time": max(eps, 1e-3)}
        points[f"vp_fixed_{name}"] = {**fixed, **at}
    for k in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0):
        points[f"vp_soft_k{k:g}"] = {**soft, "training.k": k}
    for family, (k, overrides) in _FAMILIES.items():
        points[f"{family}_fixed"] = {**overrides, **fixed}
        points[f"{family}_soft"] = {**overrides, **soft, "training.k": k}
    for k in (1.0, 2.0):
        weight = {"training.truncation": "equivalent_weight", "training.k": k}
        points[f"vp_weight_k{k:g}"] = weight
    return Sweep("digits", get_base(), points)
