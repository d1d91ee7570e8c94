"""Compiled functions agree with the same functions without the compiler, for many rows.

XLA's CPU compiler merges logarithms and `expm1` of different arguments in fusions of YNNPACK with
a reduction, from some 4,000 rows on. `main.py` turns these fusions off, and so do other tests; who
imports a module has them. So these tests compile with XLA's own options.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import build
import likelihood
import losses
import sampling
import sde_lib
from data.pixels import Preprocessing
from tests.helpers import tiny_config

ROWS = 8192
EPS = 1e-5
OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    "xla_backend_optimization_level": 2,
}
SDES = {
    "vp": sde_lib.VPSDE(),
    "subvp": sde_lib.SubVPSDE(),
    "ve": sde_lib.VESDE(),
    "rve": sde_lib.RVESDE(),
}


NAMES = {
    sde_lib.VPSDE: "vpsde",
    sde_lib.SubVPSDE: "subvpsde",
    sde_lib.VESDE: "vesde",
    sde_lib.RVESDE: "reciprocal_vesde",
}
# Sub-VP has most of what can be merged.
of_every_sde = pytest.mark.parametrize(
    "sde",
    [
        pytest.param(sde, id=name, marks=[] if name == "subvp" else pytest.mark.slow)
        for name, sde in SDES.items()
    ],
)


def compiled(function, *args):
    """The compiled function, and the operations in it that YNNPACK merges if there are two."""
    program = jax.jit(function, compiler_options=OPTIONS).lower(*args).compile()
    text = program.as_text()
    fusions = set(re.findall(r"calls=%?([\w.-]+)[^\n]*__ynn_fusion", text))
    bodies = re.findall(r"^%?(\S+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    kinds = r"= \S+ (log|log-plus-one|exponential-minus-one)\("
    merged = [op for name, body in bodies if name in fusions for op in re.findall(kinds, body)]
    return program, merged


def assert_same(name, function, *args):
    """Check a compiled function against itself without jit, and print the largest difference.

    Differences are relative to the root mean square of the values; rounding leaves up to 3e-3 of
    it where 1/σ is large.
    """
    program, merged = compiled(function, *args)
    assert not merged, name
    a, b = (np.asarray(x, np.float64) for x in (program(*args), function(*args)))
    assert a.shape == b.shape and np.isfinite(b).all()
    difference = np.max(np.abs(a - b)) / np.sqrt(np.mean(b**2))
    print(f"{name}: {difference:.1e}")
    assert difference < 0.01, name


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    t = np.exp(rng.uniform(np.log(2 * EPS), 0, ROWS)).astype(np.float32)
    return t, rng.standard_normal((ROWS, 2, 3, 1)).astype(np.float32)


def gaussian_score(sde):
    """The score of data N(0, 0.25)."""

    def score_fn(x, t, *_):
        variance = 0.25 * sde.mean_coeff(t) ** 2 + sde.std(t) ** 2
        return -x / sde_lib.expand(variance, x)

    return score_fn


def functions_of_time(sde):
    priors = {f"prior {k}": losses.TruncationPrior(k, EPS) for k in (0.5, 1.0, 1.2, 3.0)}
    config = tiny_config(sde=NAMES[type(sde)], truncation_time=EPS)
    for name in ("sigmoid", "velocity"):
        config.training.prior = name
        priors[name] = build.get_prior(config)
    return {
        "mean_coeff": sde.mean_coeff,
        "std": sde.std,
        "drift": sde.drift_coeff,
        "diffusion": sde.diffusion,
        "gamma": sde.gamma,
        "inverse_gamma": lambda t: sde.inverse_gamma(sde.gamma(EPS) * (1 - t)),
        "normalizer": sde.importance_normalizer,
        "importance_time": lambda t: sde.importance_time(t, 2 * EPS),
        "importance_tau": lambda t: sde.importance_time(0.3, t),
        "unbounded_time": lambda t: sde.unbounded_time(t, 1e-3),
        "transition a": lambda t: sde.transition(0.5 * t, t)[0],
        "transition b": lambda t: sde.transition(0.5 * t, t)[1],
        **{
            f"λ {name}": lambda t, w=weight: w(sde, t) for name, weight in losses.WEIGHTINGS.items()
        },
        **{f"cdf {name}": prior.cdf for name, prior in priors.items()},
        **{f"icdf {name}": prior.icdf for name, prior in priors.items()},
    }


@of_every_sde
def test_functions_of_time_leave_nothing_to_merge(sde, rows):
    t, z = rows[0], rows[1].reshape(ROWS, -1)
    functions = functions_of_time(sde)

    def squares(t, z):
        return [f(0.5 * t) * ((f(t)[:, None] * z) ** 2).sum(1) for f in functions.values()]

    program, merged = compiled(squares, t, z)
    assert not merged
    for name, got, wanted in zip(functions, program(t, z), squares(t, z), strict=True):
        got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
        error = np.abs(got - wanted) / np.maximum(
            np.abs(wanted), 1e-3 * np.abs(wanted).max() + 1e-30
        )
        print(f"{name}: {error.max():.1e}")
        assert error.max() < 1e-3, name


@of_every_sde
@pytest.mark.parametrize("weighting", losses.WEIGHTINGS)
@pytest.mark.parametrize("prior", ["fixed", "power", "weigh by power", "weigh by sigmoid"])
def test_objective(sde, weighting, prior, rows):
    key, images = jax.random.key(0), (rows[1] > 0).astype(np.uint8)
    score_fn, index = gaussian_score(sde), jnp.arange(ROWS)
    priors = {
        "power": losses.TruncationPrior(1.2, EPS),
        "sigmoid": losses.WeightingPrior(sde, EPS, jax.nn.sigmoid),
    }
    for dequantization, mixed in (("uniform", False), ("lossless", True)):
        objective = losses.score_matching(
            sde=sde,
            preprocessing=Preprocessing(2, True, dequantization, True),
            prior=priors.get(prior.split()[-1]),
            weighting=losses.WEIGHTINGS[weighting],
            axis_name=None,
            truncation="equivalent_weight" if "weigh" in prior else "soft",
            truncation_time=EPS,
            importance_sampling=mixed,
            stratified_times=mixed,
            batch_size=ROWS,
            reduce_mean=False,
            mixed=mixed,
            ddpm_weight=0.5,
            balanced=mixed,
            reconstruction_loss="weigh" not in prior,
        )
        assert_same(
            f"objective, {weighting} weighting, {prior}, {dequantization}",
            lambda images, o=objective: o(score_fn, key, images, index, train=False)[0],
            images,
        )


@of_every_sde
def test_decoders_and_bounds(sde, rows):
    t, z = rows
    score_fn, key = gaussian_score(sde), jax.random.key(1)
    x = jnp.asarray(np.where(z > 0, 0.5, -0.5))
    assert_same(
        "reconstruction", lambda x: losses.reconstruction_loss(score_fn, sde, x, 0.05, z), x
    )
    assert_same(
        "decoder of levels",
        lambda x: losses.discrete_decoder_loss(score_fn, sde, x, 0.05, z, -1.0, 2 / 255),
        x,
    )
    assert_same("bound of x_ε", lambda x: likelihood.nelbo_of_x_eps(sde, score_fn, x, EPS, t, z), x)
    config = tiny_config()
    config.eval.nelbo_draws = 2
    nelbo_fn = likelihood.get_nelbo_fn(config, sde, lambda _: score_fn).__wrapped__
    for options in ({}, {"lossless": True}, {"truncated_normal": True}):

        def bound(x, o=options):
            return next(iter(nelbo_fn(None, key, x, **o).values()))

        assert_same(f"NELBO {options}", bound, x)


@of_every_sde
def test_steps_of_samplers(sde, rows):
    z = jnp.asarray(rows[1])
    score_fn, x = gaussian_score(sde), 0.5 * z
    t, t_next = jnp.asarray(0.5), jnp.asarray(0.3)
    step = sampling.Step(sde, score_fn, t, t_next)
    predictors = {name: make() for name, make in sampling.PREDICTORS.items() if make}
    correctors = {name: make(0.16) for name, make in sampling.CORRECTORS.items() if make}
    for name, move in {**predictors, **correctors}.items():
        assert_same(name, lambda x, f=move: f(step, x, z)[0], x)
    for name, solver in (("heun", sampling.heun_sample), ("dpm", sampling.dpm_solver_sample)):
        assert_same(name, lambda x, f=solver: f(sde, score_fn, x, num_steps=3, eps=0.05)[0], x)


def test_xla_still_merges_two_of_a_kind(rows):
    """If this fails, jaxlib is mended, and `safe_log` and `one_minus_exp` may be what they were."""
    t, z = 0.01 + 0.4 * rows[0], rows[1].reshape(ROWS, -1)
    for function in (jnp.expm1, jnp.log1p, jnp.log):

        def product(t, z, f=function):
            return f(2 * t) * ((f(t)[:, None] * z) ** 2).sum(1)

        program, merged = compiled(product, t, z)
        assert len(merged) == 2
        difference = np.abs(np.asarray(program(t, z)) / np.asarray(product(t, z)) - 1)
        assert difference.max() > 0.1, function.__name__
