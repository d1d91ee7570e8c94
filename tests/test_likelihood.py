import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

import likelihood
import losses
import sde_lib
from data import pixels
from models import utils as mutils
from official import import_checkpoint
from tests.helpers import GOLDEN, Gaussian, Mixture, golden_config, nhwc, optimised, tiny_config

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


@pytest.mark.slow
def test_a_wrong_score_costs_bits(values):
    x, bits = values

    def wrong(_):
        return lambda x, t: 0.8 * DATA.score_fn(SDE)(x, t)

    nelbo = likelihood.get_nelbo_fn(config(), SDE, wrong)(None, jax.random.key(1), x)["nelbo"]
    nll = likelihood.get_nll_fn(config(), SDE, wrong)(None, jax.random.key(0), x)["nll"]
    assert nelbo.mean() > bits["nelbo"].mean() + 0.1
    # Each belongs to a model of its own, the reverse SDE and the ODE; both cost what is missed.
    assert nll.mean() > exact_bits(x).mean() + 0.1


def test_nelbo_constants_are_the_integrals_that_they_replace():
    t = jnp.asarray(np.geomspace(1e-5, 1, 200_001))
    integrand = (SDE.diffusion(t) / SDE.std(t)) ** 2 + 2 * SDE.drift_coeff(t)
    integral = np.trapezoid(np.asarray(integrand * t, np.float64), np.log(np.asarray(t)))
    np.testing.assert_allclose(likelihood.nelbo_constants(SDE, 1e-5, 3), -1.5 * integral, rtol=1e-4)


def test_more_levels_cost_more_bits():
    x, key = DATA.sample(8), jax.random.key(0)
    few, many = (
        likelihood.get_nll_fn(config(), SDE, make_score_fn, levels)(None, key, x)["nll"]
        for levels in (17, 256)
    )
    np.testing.assert_allclose(many - few, np.log2(256 / 17), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vp_ddpmpp", "vp_uddpmpp"])
def test_golden_likelihood(name):
    data = np.load(GOLDEN / "likelihood.npz")
    golden = {k.removeprefix(f"{name}."): v for k, v in data.items() if k.startswith(f"{name}.")}
    x, probe, z0, z1, z2 = (nhwc(golden[k]) for k in ("x", "hutchinson", "z0", "z1", "z2"))
    config = golden_config(name)
    config.training.truncation_time = eps = float(golden["eps"])
    params, _, _ = import_checkpoint.load(GOLDEN / f"{name}.pth", config)
    params = jax.tree.map(lambda w: 0.3 * w if w.ndim > 1 else w, params)
    make_score_fn = functools.partial(mutils.get_score_fn, config, SDE, mutils.create_model(config))
    nll_fn = likelihood.get_nll_fn(config, SDE, make_score_fn)
    bits = nll_fn(params, jax.random.key(0), x, probe=probe, z_eps=z0, z_residual=z1)
    np.testing.assert_allclose(bits["nll_without_residual"], golden["wrong.bpd"], atol=0.01)
    np.testing.assert_allclose(bits["latent"], nhwc(golden["correct.latent"]), atol=0.005)

    # The release puts the expectation D/2 for ½‖z‖², where ours keeps the draw, which varies less.
    def surplus(z):
        return (768 - np.sum(z**2, axis=(1, 2, 3))) / (2 * 768 * np.log(2))

    np.testing.assert_allclose(bits["nll"] - surplus(z1), golden["correct.bpd"], atol=0.01)
    score_fn = make_score_fn(params)
    remainder = losses.reconstruction_loss(score_fn, SDE, x, eps, z2) / (768 * np.log(2))
    np.testing.assert_allclose(remainder - surplus(z2), golden["elbo.residual_bpd"], atol=1e-4)

    # The release's bound has g²(‖s‖² + 2 div s) where ours has ‖s - ∇ log p_0t‖² and what is known
    # of the rest: the same expectation. From its draws, our parts give its value.
    t, z_tau = jnp.asarray(golden["elbo.t"]), golden["elbo.Z"]
    np.testing.assert_allclose(SDE.importance_normalizer(eps), z_tau, rtol=1e-4)
    score, tangent = jax.jvp(lambda x: score_fn(x, t), (losses.perturb(SDE, x, t, z0),), (probe,))
    var = SDE.std(t) ** 2
    squares = losses.sum_image(score**2) + 2 * losses.sum_image(tangent * probe)
    drift = 768 * SDE.drift_coeff(t) / SDE.diffusion(t) ** 2
    prior = SDE.prior_logp(losses.perturb(SDE, x, jnp.ones(2), z1))
    nats = -prior + z_tau * var * (0.5 * squares - drift)
    bits = likelihood.to_bits_per_dim(nats, 768, 7.0)
    np.testing.assert_allclose(bits, golden["elbo.bpd_without_residual"], rtol=1e-3)


SDES = {
    "vp": SDE,
    "subvp": sde_lib.SubVPSDE(),
    "ve": sde_lib.VESDE(0.001, 50.0),
    "rve": sde_lib.RVESDE(0.001, 50.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SDES)
def test_the_solvers_of_the_ode_agree(name):
    sde, data = SDES[name], Mixture((2, 2, 1), 0.05, 0.7)
    x, score_fn = data.sample(16), data.score_fn(sde)
    probe = jax.random.rademacher(jax.random.key(0), x.shape, dtype=jnp.float32)

    def bits(**solver):
        def solve(x):
            return likelihood.ode_log_likelihood(sde, score_fn, x, probe, eps=1e-5, **solver)

        logp, latent, _ = optimised(solve)(x)
        return np.asarray(logp) / (4 * np.log(2)), np.asarray(latent) / sde.prior_std()

    value, latent = bits(rtol=1e-5, atol=1e-5)
    coarse, fine = (bits(num_steps=n) for n in (24, 96))
    np.testing.assert_allclose(fine[0], value, atol=1e-3)
    np.testing.assert_allclose(fine[1], latent, atol=1e-3)
    # Of fourth order: a quarter of the step has 1/256 of the error, and float32 its own.
    error = np.abs(coarse[0] - value).max()
    assert np.abs(fine[0] - value).max() < error / 64 + 5e-4
    # On t an adaptive solver is off by whole bits on RVE, whose clock is 1/t.
    np.testing.assert_allclose(bits(rtol=1e-3, atol=1e-3)[0], value, atol=0.1)


@pytest.mark.parametrize("name", ["subvp", "ve", "rve"])
def test_likelihood_is_exact_on_every_sde(name):
    sde = SDES[name]
    x = DATA.sample(4000)

    def make_score_fn(_):
        return DATA.score_fn(sde)

    nll = likelihood.get_nll_fn(config(), sde, make_score_fn)(None, jax.random.key(0), x)
    nelbo = likelihood.get_nelbo_fn(config(), sde, make_score_fn)(None, jax.random.key(1), x)
    assert abs(nll["nll"].mean() - exact_bits(x).mean()) < 0.01
    gap = np.asarray(nelbo["nelbo"], np.float64) - exact_bits(x)
    assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(len(gap)) + 0.005


@pytest.fixture(scope="module", params=["gaussian", "mixture"])
def known_density(request):
    """Values of 100 repetitions of 40 images with 3 draws, and the exact expectation in bits."""
    data = {
        "gaussian": Gaussian((2, 2, 1), [0.02, 0.1, 0.3, 0.6], [0.5, -0.3, 0.0, 0.2]),
        "mixture": Mixture((2, 2, 1), 0.05, 0.7),
    }[request.param]
    x = data.sample(4000, seed=7)

    def make_score_fn(_):
        return data.score_fn(SDE)

    nll_fn = likelihood.get_nll_fn(config(), SDE, make_score_fn)
    nelbo_fn = likelihood.get_nelbo_fn(config(), SDE, make_score_fn)
    draws = []
    for i in range(3):
        key = jax.random.key(i)
        draws.append(nll_fn(None, key, x) | nelbo_fn(None, key, x))
    values = {
        name: np.stack([np.asarray(draw[name], float) for draw in draws])
        for name in ("nll", "nll_without_residual", "nelbo")
    }
    if request.param == "mixture":
        entropy = data.entropy()
    else:
        entropy = 0.5 * np.sum(np.log(2 * np.pi * np.e * data.variances))
    return values, data.nats(x) / (4 * np.log(2)) + 7, entropy / (4 * np.log(2)) + 7


@pytest.mark.slow
def test_bits_of_a_known_density_are_exact(known_density):
    values, exact, _ = known_density
    for name in ("nll", "nll_without_residual"):
        assert abs(values[name].mean() - exact.mean()) < 0.01
    # The bound is not below the truth, by more than its own noise.
    mean, _, of_draws = likelihood.mean_and_errors(values["nelbo"] - exact)
    assert mean > -3 * of_draws


@pytest.mark.parametrize("name", ["nll", "nelbo"])
def test_standard_errors_cover_the_truth_at_their_rate(known_density, name):
    values, exact, expected = known_density
    covered, covered_by_draws, narrow = 0, 0, 0
    for i in range(100):
        part = np.s_[:, 40 * i : 40 * (i + 1)]
        mean, stderr, of_draws = likelihood.mean_and_errors(values[name][part])
        covered += abs(mean - expected) < 1.96 * stderr
        narrow += abs(mean - expected) < 0.674 * stderr
        # Of these very images the value is known, and only the draws are uncertain.
        covered_by_draws += abs(mean - exact[part[1]].mean()) < 1.96 * of_draws
    # 95 of 100 are expected; a binomial count is within 86 … 100 but once in 1,000 times.
    assert 86 <= covered <= 100
    assert 86 <= covered_by_draws <= 100
    # Nor are they too large: 50 of 100 lie within the median error.
    assert 34 <= narrow <= 66


def test_the_error_of_a_mean_over_images_and_draws():
    rng = np.random.default_rng(0)
    reps = 3 * rng.standard_normal((2000, 1, 20)) + rng.standard_normal((2000, 5, 20))
    means, errors, of_draws = np.array([likelihood.mean_and_errors(v) for v in reps]).T
    np.testing.assert_allclose(np.sqrt(np.mean(errors**2)), means.std(), rtol=0.05)
    np.testing.assert_allclose(np.sqrt(np.mean(of_draws**2)), 1 / np.sqrt(100), rtol=0.05)
    assert likelihood.mean_and_errors(reps[0, :1])[2] is None


def test_an_image_has_the_same_draws_in_any_batch():
    x, keys = DATA.sample(6), jax.random.split(jax.random.key(3), 6)
    nelbo_fn = likelihood.get_nelbo_fn(config(), SDE, make_score_fn)
    whole = nelbo_fn(None, keys, x)["nelbo"]
    halves = [nelbo_fn(None, keys[part], x[part])["nelbo"] for part in (np.s_[:3], np.s_[3:])]
    np.testing.assert_allclose(whole, np.concatenate(halves), rtol=1e-5)
    assert len(np.unique(whole)) == 6


def test_the_lossless_nelbo_bounds_the_entropy_of_levels():
    # Of a discretised Gaussian, no code is shorter than the levels' entropy. The score of the
    # Gaussian, which does not see levels, comes near it if σ(ε) is about their distance.
    data, num_levels = Gaussian((2, 2, 1), 0.04, 0.0), 65
    cfg = config()
    cfg.data.update(dequantization="lossless")
    cfg.training.truncation_time = 5e-3
    lowest, width = pixels.Preprocessing(num_levels, True, "none", False).level_grid
    x = lowest + width * jnp.clip(jnp.round((data.sample(4000) - lowest) / width), 0, 64)
    nelbo_fn = likelihood.get_nelbo_fn(cfg, SDE, lambda _: data.score_fn(SDE), num_levels)
    bits = np.asarray(nelbo_fn(None, jax.random.key(0), x, lossless=True)["nelbo_lossless"])
    levels = np.linspace(-1, 1, num_levels)
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    p = np.diff(scipy.stats.norm.cdf(edges, scale=0.2))
    entropy = -np.sum(p * np.log2(np.maximum(p, 1e-300)))
    stderr = bits.std() / np.sqrt(len(bits))
    assert -4 * stderr < bits.mean() - entropy < 0.3 + 4 * stderr


def test_the_weights_of_fixed_steps_integrate_polynomials_exactly():
    h, num = 0.3, 40
    corrector, predictor, quadrature = likelihood._adams_weights(h, num)

    def exact(power, start, stop):
        return scipy.integrate.quad(lambda u: 0.5 * np.exp(u / 2) * u**power, start, stop)[0]

    for power in range(4):
        nodes = (h * np.arange(num + 1)) ** power
        np.testing.assert_allclose(quadrature @ nodes, (h * num) ** (power + 1) / (power + 1))
        before = (-h * np.arange(4)) ** power
        np.testing.assert_allclose(corrector[num] @ before, exact(power, -h, 0), rtol=1e-8)
        if power < 3:
            np.testing.assert_allclose(predictor[5] @ before[:3], exact(power, 0, h), rtol=1e-8)


def test_each_nll_is_of_the_point_that_its_name_says():
    # At an ε where x_0 and x_ε are far apart, and draw by draw.
    data, cfg = Gaussian((2, 2, 1), 0.2, 0.1), config()
    cfg.training.truncation_time, cfg.eval.nll_steps = 0.1, 32
    alpha, std = float(SDE.mean_coeff(0.1)), float(SDE.std(0.1))
    diffused = Gaussian((2, 2, 1), alpha**2 * 0.2 + std**2, alpha * 0.1)
    x, z, z_residual = data.sample(16), data.sample(16, seed=2), data.sample(16, seed=3)
    nll_fn = likelihood.get_nll_fn(cfg, SDE, lambda _: data.score_fn(SDE))
    bits = nll_fn(None, jax.random.key(0), x, z_eps=z, z_residual=z_residual)
    residual = losses.reconstruction_loss(data.score_fn(SDE), SDE, x, 0.1, z_residual)
    of_x_eps = diffused.nats(alpha * x + std * z) + np.asarray(residual)
    for name, nats in (("nll_without_residual", diffused.nats(x)), ("nll", of_x_eps)):
        np.testing.assert_allclose(bits[name], nats / (4 * np.log(2)) + 7, atol=0.01)
