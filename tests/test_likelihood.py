import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import import_checkpoint
import likelihood
import sde_lib
from models import utils as mutils
from tests.helpers import GOLDEN, Gaussian, golden_config, nhwc, tiny_config

SDE = sde_lib.VPSDE()
DATA = Gaussian((2, 2, 1), [0.02, 0.1, 0.3, 0.6], [0.5, -0.3, 0.0, 0.2])


def config():
    config = tiny_config()
    config.eval.update(rtol=1e-5, atol=1e-5, nelbo_draws=16)
    return config


def exact_bits(x):
    return DATA.nats(x) / (4 * np.log(2)) + 7


def make_score_fn(_):
    return DATA.score_fn(SDE)


@pytest.fixture(scope="module")
def values():
    x = DATA.sample(10_000)
    nll = likelihood.get_nll_fn(config(), SDE, make_score_fn)(None, jax.random.key(0), x)
    nelbo = likelihood.get_nelbo_fn(config(), SDE, make_score_fn)(None, jax.random.key(1), x)
    return x, {k: np.asarray(v, np.float64) for k, v in (nll | nelbo).items()}


@pytest.mark.parametrize("name", ["nll", "nll_without_residual"])
def test_nll_of_a_gaussian_is_exact(values, name):
    x, bits = values
    assert abs(bits[name].mean() - exact_bits(x).mean()) < 0.01


def test_divergence_needs_no_average_where_the_jacobian_is_diagonal():
    # A Rademacher probe gives the trace of a diagonal matrix exactly: every image, not the mean.
    data = Gaussian((2, 2, 1), 0.2, 0.1)
    x = data.sample(16)
    nll_fn = likelihood.get_nll_fn(config(), SDE, lambda _: data.score_fn(SDE))
    bits = nll_fn(None, jax.random.key(0), x)["nll_without_residual"]
    np.testing.assert_allclose(bits, data.nats(x) / (4 * np.log(2)) + 7, atol=0.01)


@pytest.mark.parametrize("name", ["nelbo", "nelbo_without_residual"])
def test_nelbo_is_tight_for_the_exact_score(values, name):
    # The bound's gap is the mismatch of p_T and the prior, nearly nothing at T = 1.
    x, bits = values
    gap = bits[name] - exact_bits(x)
    stderr = gap.std() / np.sqrt(len(gap))
    assert stderr < 0.03
    assert abs(gap.mean()) < 4 * stderr + 0.005


def test_a_wrong_score_costs_bits(values):
    x, bits = values
    wrong = lambda _: lambda x, t: 0.8 * DATA.score_fn(SDE)(x, t)  # noqa: E731
    nelbo = likelihood.get_nelbo_fn(config(), SDE, wrong)(None, jax.random.key(1), x)["nelbo"]
    nll = likelihood.get_nll_fn(config(), SDE, wrong)(None, jax.random.key(0), x)["nll"]
    assert nelbo.mean() > bits["nelbo"].mean() + 0.1
    # Each belongs to a model of its own, the reverse SDE and the ODE; both cost what is missed.
    assert nll.mean() > exact_bits(x).mean() + 0.1


def test_known_terms_are_the_integrals_that_they_replace():
    t = jnp.asarray(np.geomspace(1e-5, 1, 200_001))
    integrand = (SDE.diffusion(t) / SDE.std(t)) ** 2 + 2 * SDE.drift_coeff(t)
    integral = np.trapezoid(np.asarray(integrand * t, np.float64), np.log(np.asarray(t)))
    np.testing.assert_allclose(likelihood.known_terms(SDE, 1e-5, 3), -1.5 * integral, rtol=1e-4)


def test_more_levels_cost_more_bits():
    x, key = DATA.sample(8), jax.random.key(0)
    few, many = (
        likelihood.get_nll_fn(config(), SDE, make_score_fn, levels)(None, key, x)["nll"]
        for levels in (17, 256)
    )
    np.testing.assert_allclose(many - few, np.log2(256 / 17), rtol=1e-4)


def test_golden_likelihood():
    prefix = "vp_ddpmpp."
    data = np.load(GOLDEN / "likelihood.npz")
    golden = {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}
    x, probe, z0, z1, z2 = (nhwc(golden[k]) for k in ("x", "hutchinson", "z0", "z1", "z2"))
    config = golden_config("vp_ddpmpp")
    config.training.truncation_time = eps = float(golden["eps"])
    params, _, _ = import_checkpoint.load(GOLDEN / "vp_ddpmpp.pth", config)
    params = jax.tree.map(lambda w: 0.3 * w if w.ndim > 1 else w, params)
    make_score_fn = functools.partial(mutils.get_score_fn, config, SDE, mutils.create_model(config))
    nll_fn = likelihood.get_nll_fn(config, SDE, make_score_fn)
    bits = nll_fn(params, jax.random.key(0), x, probe, z0, z1)
    np.testing.assert_allclose(bits["nll_without_residual"], golden["wrong.bpd"], atol=0.01)
    np.testing.assert_allclose(bits["latent"], nhwc(golden["correct.latent"]), atol=0.005)

    # The release puts the expectation D/2 for ½‖z‖², where ours keeps the draw, which varies less.
    def surplus(z):
        return (768 - np.sum(z**2, axis=(1, 2, 3))) / (2 * 768 * np.log(2))

    np.testing.assert_allclose(bits["nll"] - surplus(z1), golden["correct.bpd"], atol=0.01)
    remainder = likelihood.residual(SDE, make_score_fn(params), x, z2, eps) / (768 * np.log(2))
    np.testing.assert_allclose(remainder - surplus(z2), golden["elbo.residual_bpd"], atol=1e-4)
