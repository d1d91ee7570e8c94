"""The grid of runs that test the paper's claim, and the tables that they belong to.

**Likelihood** is evaluated at each run's own `training.truncation_time` ε, the smallest time of its
training; below ε a network would extrapolate. With the residual, NLL and NELBO bound the likelihood
of the same images for every ε, so they are comparable between runs with different ε. Without the
residual they ignore everything below ε, and are not comparable. NLL is computed with a fixed number
of steps, because the error of an adaptive solver at a loose tolerance (0.01 to 0.02 bits/dim on
digits) differs between networks and would look like a difference of the networks.

**Samples** are drawn by the same sampler with the same number of evaluations for all runs, since
the claim is about what the networks have learnt. It stops at t = 1e-3, where σ is about 0.01 for VP
and for VE, so that training at smaller times affects only the likelihood. The run with fixed
ε = 1e-2 stops at 1e-2, the end of its training. All samples end with one denoising step. For RVE,
t = 1e-3 is still pure noise; its sampler stops at ε, where σ is 0.01 as well. Sub-VP's σ at 1e-3 is
1e-4, so samples are only comparable within an SDE.
"""

from typing import Any

_SOFT_K = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
_EPSILONS = {"1e-2": 1e-2, "1e-3": 1e-3, "1e-4": 1e-4, "1e-5": 1e-5}
_FIXED = "vp_fixed_1e-5"


def get_points(sigma_max: float) -> dict[str, dict[str, Any]]:
    """All points: {name: overrides of a VP config}.

    The base config must have ε = 1e-5, likelihood weighting, importance sampling, and a sampler
    that stops at 1e-3.

    Args:
      sigma_max: σ_max of VE and RVE, about the largest distance of two images in [0, 1].
    """
    fixed, soft = {"training.truncation": "fixed"}, {"training.truncation": "soft"}
    points: dict[str, dict[str, Any]] = {}
    for name, eps in _EPSILONS.items():
        points[f"vp_fixed_{name}"] = {
            **fixed,
            "training.truncation_time": eps,
            "sampling.truncation_time": max(eps, 1e-3),
        }
    for k in _SOFT_K:
        points[f"vp_soft_k{k:g}"] = {**soft, "training.k": k}
    variance = {"training.likelihood_weighting": False, "training.importance_sampling": False}
    exploding = {
        "data.centered": False,
        "model.embedding_type": "fourier",
        "model.fourier_scale": 1.0,  # as in configs/ve/digits_st.py
        "model.fir": True,
        "model.progressive_input": "residual",
        "model.scale_by_sigma": True,
        "model.sigma_max": sigma_max,
    }
    families: dict[str, tuple[float, dict[str, Any]]] = {
        "vp_variance": (1.0, variance),
        "ve": (2.0, {**exploding, "training.sde": "vesde"}),
        "rve": (
            2.0,
            {
                **exploding,
                "training.sde": "reciprocal_vesde",
                "sampling.truncation_time": 1e-5,
            },
        ),
        "subvp": (1.0, {"training.sde": "subvpsde"}),
    }
    for name, (k, overrides) in families.items():
        points[f"{name}_fixed"] = {**overrides, **fixed}
        points[f"{name}_soft"] = {**overrides, **soft, "training.k": k}
    for k in (1.0, 2.0):
        weight = {"training.truncation": "equivalent_weight", "training.k": k}
        points[f"vp_weight_k{k:g}"] = weight
    return points


# {letter of a table: (label, point) of each row}; the rows of tables c and d are in pairs.
TABLES: dict[str, tuple[tuple[str, str], ...]] = {
    "a": tuple((f"ε = {name}", f"vp_fixed_{name}") for name in _EPSILONS),
    "b": (*((f"k = {k:g}", f"vp_soft_k{k:g}") for k in _SOFT_K), ("k = ∞ (fixed)", _FIXED)),
    "c": (
        ("VP, likelihood: fixed ε", _FIXED),
        ("VP, likelihood: soft truncation", "vp_soft_k1"),
        ("VP, variance: fixed ε", "vp_variance_fixed"),
        ("VP, variance: soft truncation", "vp_variance_soft"),
        ("VE: fixed ε", "ve_fixed"),
        ("VE: soft truncation", "ve_soft"),
        ("RVE: fixed ε", "rve_fixed"),
        ("RVE: soft truncation", "rve_soft"),
        ("sub-VP: fixed ε", "subvp_fixed"),
        ("sub-VP: soft truncation", "subvp_soft"),
    ),
    "d": (
        ("k = 1: soft truncation", "vp_soft_k1"),
        ("k = 1: equivalent weight", "vp_weight_k1"),
        ("k = 2: soft truncation", "vp_soft_k2"),
        ("k = 2: equivalent weight", "vp_weight_k2"),
    ),
}
