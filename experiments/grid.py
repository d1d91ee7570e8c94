"""The points of the paper's claim, once each, and which of them belong to which table.

**Where likelihood is scored.** Each run at its own `training.truncation_time`, the smallest time
that it was trained at. With the residual, NLL and NELBO bound the likelihood of the same images
whatever ε is, so they compare points of different ε; below its ε a network is untrained, and a
score there would be of an extrapolation. Without the residual a figure says nothing of what lies
below ε, and does not compare points of different ε. NLL is solved in steps of a fixed size: an
adaptive solver's error at a loose tolerance (0.01 to 0.02 bits/dim on digits) differs from network
to network, and would be taken for theirs.

**How samples are drawn.** By one sampler with one number of evaluations for all, since the claim is
about what the networks learnt, not about where a sampler stops. It stops at t = 1e-3, where σ is
about 0.01 for VP as for VE, which leaves the training below that to the likelihood alone; with a
fixed ε of 1e-2 it stops at 1e-2, where that network's training ends. All end with one denoising.
RVE has another clock, by which t = 1e-3 is still pure noise: its sampler goes down to its ε, where
its σ is 0.01 as well. Sub-VP's σ at 1e-3 is 1e-4; tables compare within an SDE.
"""

from typing import Any

_SOFT_K = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
_EPSILONS = {"1e-2": 1e-2, "1e-3": 1e-3, "1e-4": 1e-4, "1e-5": 1e-5}
_FIXED = "vp_fixed_1e-5"


def get_points(sigma_max: float) -> dict[str, dict[str, Any]]:
    """All points, from their names to overrides of a VP config.

    The base has ε = 1e-5, the likelihood weighting, importance sampling, and a sampler that stops
    at 1e-3.

    Args:
      sigma_max: VE's and RVE's, about the largest distance of two images in [0, 1].
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


# (label, point) of each row of a table, by its letter; those of c and d come in pairs.
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
