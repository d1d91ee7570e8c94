"""Parametrisations, priors of weightings, stratified times and truncated-normal dequantisation."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import build
import likelihood
import losses
import sde_lib
from configs.errors import UserError
from configs.validate import validate
from models import utils as mutils
from models.score import preconditioning
from official import import_checkpoint
from tests.helpers import loss_fn_of, score_model, times_of_step, tiny_config
from tests.test_losses import step_losses_and_grads, toy_config

SDES = {
    "vpsde": sde_lib.VPSDE(),
    "subvpsde": sde_lib.SubVPSDE(),
    "vesde": sde_lib.VESDE(),
    "reciprocal_vesde": sde_lib.RVESDE(0.01, 50.0, eps=1e-5),
}
SLOW = pytest.mark.slow
TIMES = np.geomspace(1e-5, 1, 41).astype(np.float32)


def velocity_config(sde, sigma_data=1.0):
    config = tiny_config(sde=sde)
    config.model.update(parametrization="velocity", sigma_data=sigma_data)
    config.sampling.update(method="dpm_solver", num_steps=12)
    return config


class Zero:
    def apply(self, variables, x, time_cond, train=False, dropout_keys=None):
        return jnp.zeros_like(x)


class Smooth:
    """Some network F: smooth in the image and in the label."""

    def apply(self, variables, x, time_cond, train=False, dropout_keys=None):
        label = sde_lib.expand(jnp.log1p(time_cond), x)
        return jnp.tanh(0.7 * x + 0.1 * label) - 0.3 * jnp.roll(x, 1, axis=1)


@dataclasses.dataclass
class SameScore:
    """The network of the noise parametrisation with the score of `Smooth`'s velocity."""

    sde: sde_lib.SDE
    sigma_data: float
    time_of_label: object

    def apply(self, variables, x, time_cond, train=False, dropout_keys=None):
        t = self.time_of_label(time_cond)
        c_in, a, b = (sde_lib.expand(c, x) for c in preconditioning(self.sde, t, self.sigma_data))
        score = a * x + b * Smooth().apply(variables, c_in * x, time_cond)
        return score if self.sde.exploding else -sde_lib.expand(self.sde.std(t), x) * score


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("name", SDES)
def test_a_network_of_zeros_has_the_exact_score_of_a_gaussian(name, sigma_data):
    sde, config = SDES[name], velocity_config(name, sigma_data)
    score_fn = mutils.get_score_fn(config, sde, Zero(), None)
    x = np.random.default_rng(0).standard_normal((len(TIMES), 2, 2, 1)).astype(np.float32)
    alpha, std = (np.asarray(f(TIMES), np.float64) for f in (sde.mean_coeff, sde.std))
    exact = -x.astype(np.float64) / sde_lib.expand((alpha * sigma_data) ** 2 + std**2, x)
    np.testing.assert_allclose(score_fn(x, TIMES), exact, rtol=1e-6)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("name", SDES)
def test_the_denoised_image_is_edms_combination(name, sigma_data):
    sde, config = SDES[name], velocity_config(name, sigma_data)
    x = np.random.default_rng(0).standard_normal((len(TIMES), 2, 2, 1)).astype(np.float32)
    score = mutils.get_score_fn(config, sde, Smooth(), None)(x, TIMES)
    alpha, std = (
        sde_lib.expand(np.asarray(f(TIMES), np.float64), x) for f in (sde.mean_coeff, sde.std)
    )
    alpha, std, x = (np.asarray(value, np.float64) for value in (alpha, std, x))
    c_in = 1 / np.sqrt(alpha**2 * sigma_data**2 + std**2)
    time_cond = score_model(config, sde, Smooth()).time_cond(TIMES)
    x_in = jnp.asarray(c_in * x, jnp.float32)
    f = np.asarray(Smooth().apply(None, x_in, time_cond), np.float64)
    d = alpha * sigma_data**2 * c_in**2 * x + std * sigma_data * c_in * f
    exact = (alpha * d - x) / std**2
    scale = np.abs(exact).reshape(len(x), -1).max(axis=1).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(score / scale, exact / scale, atol=2e-6)


@pytest.mark.parametrize("name", SDES)
def test_its_likelihood_is_the_gaussians(name):
    sde, config = SDES[name], velocity_config(name, 0.5)
    config.eval.update(nll_steps=0, rtol=1e-6, atol=1e-6)
    x = 0.5 * np.random.default_rng(0).standard_normal((16, 2, 2, 1)).astype(np.float32)
    nats = -scipy.stats.norm.logpdf(x, scale=0.5).reshape(16, -1).sum(axis=1)
    if sde.exploding:  # p_ε is a little wider than the data, p_T than the prior
        variance = 0.25 + float(sde.std(1e-5)) ** 2
        nats = -scipy.stats.norm.logpdf(x, scale=variance**0.5).reshape(16, -1).sum(axis=1)
    offset = np.log2(17) - 1
    nll_fn = likelihood.get_nll_fn(
        config, sde, lambda _: mutils.get_score_fn(config, sde, Zero(), None), 17
    )
    bits = jax.jit(nll_fn)(None, jax.random.key(0), jnp.asarray(x))["nll_without_residual"]
    np.testing.assert_allclose(bits, nats / (4 * np.log(2)) + offset, atol=2e-3)


@pytest.mark.parametrize("name", ["vpsde", pytest.param("vesde", marks=SLOW)])
def test_both_parametrisations_of_a_score_are_the_same_model(name):
    sde, config = SDES[name], velocity_config(name, 0.7)
    noise = config.copy_and_resolve_references()
    noise.model.parametrization = "noise"
    time_cond = score_model(config, sde, Smooth()).time_cond
    fine = np.geomspace(1e-5, 1, 20_001)
    table = np.asarray(time_cond(jnp.asarray(fine, jnp.float32)), np.float64)
    order = np.argsort(table)

    def time_of_label(label):
        if name == "vpsde":
            return label / 999
        return jnp.interp(label, table[order], fine[order])

    velocity_fn = mutils.get_score_fn(config, sde, Smooth(), None)
    noise_fn = mutils.get_score_fn(noise, sde, SameScore(sde, 0.7, time_of_label), None)
    x = jax.random.normal(jax.random.key(0), (len(TIMES), 2, 2, 1))
    scale = np.abs(velocity_fn(x, TIMES)).reshape(len(TIMES), -1).max(axis=1)[:, None]
    ours, theirs = (
        np.asarray(f(x, TIMES)).reshape(len(TIMES), -1) for f in (velocity_fn, noise_fn)
    )
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=2e-4 if sde.exploding else 2e-6)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 17, (8, 8, 8, 1)), jnp.uint8)
    models = {"velocity": (config, Smooth()), "noise": (noise, SameScore(sde, 0.7, time_of_label))}
    results = []
    for of_model, model in models.values():
        loss_fn = loss_fn_of(of_model, sde, model, 17, train=False)
        loss = loss_fn(None, losses.step_key(0, 0), images, jnp.arange(8))[0]

        def make_score_fn(_, of_model=of_model, model=model):
            return mutils.get_score_fn(of_model, sde, model, None)

        of_model.eval.nll_steps = 32
        nll_fn = likelihood.get_nll_fn(of_model, sde, make_score_fn, 17)
        nll = nll_fn(None, jax.random.key(1), images / 8.0 - 1)["nll"]
        samples, _ = build.get_sampling_fn(of_model, sde, make_score_fn, 8)(None, jax.random.key(2))
        results.append((loss, nll, samples))
    for one, other, within in zip(*results, (1e-3, 1e-3, 1e-3), strict=True):
        np.testing.assert_allclose(one, other, rtol=within, atol=within)


def test_what_has_no_velocity_is_refused():
    config = velocity_config("vesde")
    config.model.scale_by_sigma = True
    with pytest.raises(UserError, match="scale_by_sigma must be False"):
        validate(config, 1, build.REGISTRIES)
    config = velocity_config("vesde")
    config.model.name = "ncsnv2_64"
    with pytest.raises(UserError, match="parametrization must be noise"):
        validate(config, 1, build.REGISTRIES)
    with pytest.raises(UserError, match="official networks predict the noise"):
        import_checkpoint.load("none.pth", velocity_config("vpsde"))


def prior_of(sde, name, bias=0.0):
    config = tiny_config(sde=sde, prior=name, sigmoid_bias=bias)
    return build.get_prior(config)


OTHERS = ("subvpsde", "vesde", "reciprocal_vesde")
PRIORS = [("sigmoid", 0.0), ("sigmoid", -3.0), ("sigmoid", 4.0), ("velocity", 0.0)]


@pytest.mark.parametrize(("name", "bias"), PRIORS)
@pytest.mark.parametrize("sde", ["vpsde", *(pytest.param(sde, marks=SLOW) for sde in OTHERS)])
def test_a_weighting_is_the_cdf_of_its_prior(sde, name, bias):
    prior = prior_of(sde, name, bias)
    gamma = np.asarray(SDES[sde].gamma(TIMES), np.float64)
    w = 1 / (1 + np.exp(-gamma - bias)) if name == "sigmoid" else np.exp(gamma / 2)
    np.testing.assert_allclose(prior.cdf(TIMES), w / w[-1], rtol=3e-5, atol=1e-6)
    atom = float(prior.cdf(1e-5))
    u = np.linspace(0, 1, 1001).astype(np.float32)
    tau = prior.icdf(u)
    np.testing.assert_allclose(tau[u < atom], 1e-5, rtol=1e-4)
    np.testing.assert_allclose(prior.cdf(tau)[u > atom], u[u > atom], atol=1e-5)
    # The same by bisection, for a weighting without a known inverse.
    found = dataclasses.replace(prior, inverse_weight=None).icdf(u)
    np.testing.assert_allclose(prior.cdf(found)[u > atom], u[u > atom], atol=1e-5)
    losses.check_prior(prior, SDES[sde], 1e-5, name)


@pytest.mark.parametrize(
    ("sde", "name"),
    [
        pytest.param(sde, name, marks=() if (sde, name) == ("vpsde", "sigmoid") else SLOW)
        for sde, name in [*((sde, "sigmoid") for sde in SDES), ("vesde", "velocity")]
    ],
)
def test_drawing_tau_and_its_weight_have_the_same_expectation(sde, name):
    values = {}
    for truncation in ("soft", "equivalent_weight"):
        config = toy_config(truncation, 1, True, True)
        config.training.update(sde=sde, prior=name, sigmoid_bias=1.0)
        config.model.update(sigma_min=0.1, sigma_max=5.0)
        values[truncation] = step_losses_and_grads(config, 60_000)
    one, other = values["soft"], values["equivalent_weight"]
    error = np.hypot(*(v.std(axis=0) / len(v) ** 0.5 for v in (one, other)))
    off = np.abs(one.mean(axis=0) - other.mean(axis=0))
    assert (off < 4.5 * error).all(), off / error
    assert (error < 0.05 * np.abs(one.mean(axis=0))).all()  # or nothing would be shown


def refused(prior, line):
    with pytest.raises(UserError, match=line):
        losses.check_prior(prior, SDES["vpsde"], 1e-5, "mine")


def test_what_is_no_prior_is_refused_at_the_start(monkeypatch):
    power = losses.TruncationPrior(1.0, 1e-5)

    class WithoutCdf:
        icdf = power.icdf

    class WrongInverse:
        cdf = power.cdf

        def icdf(self, u):
            return power.icdf(u**2)

    class Unnormalised:
        icdf = power.icdf

        def cdf(self, t):
            return 0.5 * power.cdf(t)

    hump = losses.WeightingPrior(SDES["vpsde"], 1e-5, lambda gamma: 1 / jnp.cosh(0.2 * gamma))
    losses.check_prior(power, SDES["vpsde"], 1e-5, "power")
    refused(WithoutCdf(), "it has no cdf")
    refused(WrongInverse(), r"cdf\(icdf\(0\.0.*must be the inverse")
    refused(Unnormalised(), "must rise from 0 or more to 1 at T")
    refused(hump, "training.weighting")
    falls = dataclasses.replace(hump, weight=lambda gamma: gamma + 20 + 3 * jnp.sin(gamma))
    refused(falls, r"falls between t = .* and .*training\.weighting")
    monkeypatch.setitem(losses.PRIORS, "mine", WithoutCdf)
    with pytest.raises(UserError, match=r"training\.prior=mine: it has no cdf"):
        build.set_up(tiny_config(prior="mine"))


@pytest.mark.parametrize("mixed", [False, True])
def test_stratified_times_are_evenly_spread_and_the_same_on_any_device(mixed):
    config = tiny_config(batch_size=32, stratified_times=True, truncation="fixed", mixed=mixed)
    sde = sde_lib.get_sde(config)
    _, t = times_of_step(config, sde, 5)
    gamma = np.asarray(sde.gamma(t), np.float64)
    ends = [float(sde.gamma(time)) for time in (1e-5, 1.0)]
    u = (gamma - ends[0]) / (ends[1] - ends[0])
    u = u[::2] if mixed else u
    spaces = np.diff(np.sort(u))
    np.testing.assert_allclose(spaces, 1 / len(u), atol=2e-3)
    # A device has some of the images, and each has the time of its index.
    objective = build.get_objective(config, sde)
    objective = objective.first if mixed else objective
    key = jax.random.split(losses.step_key(config.seed, 5))[1]
    whole, part = (
        objective.draw_times(key, jax.random.split(key, len(index)), index, 1e-5)[0]
        for index in (jnp.arange(32), jnp.arange(8, 16))
    )
    np.testing.assert_array_equal(whole[8:16], part)


def test_stratified_times_have_the_same_mean_and_less_noise():
    values = {}
    for stratified in (False, True):
        config = toy_config("fixed", 1, True, True)
        config.training.update(stratified_times=stratified, batch_size=4)
        values[stratified] = step_losses_and_grads(config, 20_000)
    error = np.hypot(*(v.std(axis=0) / len(v) ** 0.5 for v in values.values()))
    assert (np.abs(values[True].mean(axis=0) - values[False].mean(axis=0)) < 4.5 * error).all()
    assert values[True][:, 0].std() < 0.96 * values[False][:, 0].std()


class Points:
    """Two pixels of three levels with known probabilities, and the density of their diffusion."""

    levels = np.array(list(itertools.product(range(3), repeat=2)))
    x0 = levels - 1.0
    p = np.array([0.2, 0.05, 0.1, 0.02, 0.3, 0.08, 0.1, 0.05, 0.1])

    def __init__(self, sde, eps):
        self.sde, self.eps = sde, eps
        self.alpha, self.std = (float(f(jnp.float32(eps))) for f in (sde.mean_coeff, sde.std))

    def score_fn(self, _):
        points, log_p = jnp.asarray(self.x0, jnp.float32), jnp.log(jnp.asarray(self.p))

        def score(x, t):
            alpha, std = self.sde.mean_coeff(t)[:, None], self.sde.std(t)[:, None]
            flat = x.reshape(len(x), -1)
            off = flat[:, None] - alpha[..., None] * points
            weight = jax.nn.softmax(log_p - 0.5 * jnp.sum(off**2, -1) / std**2, axis=1)
            mean = weight @ points
            return ((alpha * mean - flat) / std**2).reshape(x.shape)

        return score

    def log_p_eps(self, x):
        off = x[..., None, :] - self.alpha * self.x0
        log = np.log(self.p) - 0.5 * np.sum(off**2, -1) / self.std**2
        return np.logaddexp.reduce(log, axis=-1) - np.log(2 * np.pi * self.std**2)

    def of_cell(self, x0, radius):
        """(-log of the cell's probability, the bound of one draw: E_q[log q - log p_ε])."""
        n = 400
        z = (np.arange(n) + 0.5) / n * 2 * radius - radius
        grid = np.stack(np.meshgrid(z, z, indexing="ij"), -1)
        log_p = self.log_p_eps(self.alpha * x0 + self.std * grid)
        area = (2 * radius * self.std / n) ** 2
        q = np.exp(-0.5 * np.sum(grid**2, -1))
        q /= q.sum() * area
        return -np.log(np.exp(log_p).sum() * area), np.sum(q * (np.log(q) - log_p)) * area


@pytest.fixture(scope="module", params=[1.0, pytest.param(3.0, marks=SLOW)])
def bounds(request):
    """For r = 1 and 3: the exact numbers of each cell, and many draws of the bounds, in nats."""
    sde = SDES["vpsde"]
    eps = likelihood.largest_eps(sde, 1.0, request.param)
    points = Points(sde, eps)
    config = tiny_config(truncation_time=eps)
    config.data.update(dequantization="lossless", image_size=2)
    config.eval.update(nll_steps=128, nelbo_draws=16)
    exact = np.array([points.of_cell(x0, request.param) for x0 in points.x0])
    draws = 1000
    x = jnp.asarray(np.repeat(points.x0, draws, axis=0).reshape(-1, 1, 2, 1), jnp.float32)
    given = {"truncated_normal": True}
    nll_fn = likelihood.get_nll_fn(config, sde, points.score_fn, 3)
    # Together these two probes give the exact trace of a 2×2 matrix.
    probes = (jnp.broadcast_to(jnp.array([[[[1.0], [sign]]]]), x.shape) for sign in (1, -1))
    both = [nll_fn(None, jax.random.key(0), x, probe=probe, **given) for probe in probes]
    nelbo_fn = likelihood.get_nelbo_fn(config, sde, points.score_fn, 3)
    bits = nelbo_fn(None, jax.random.key(0), x, **given)
    bits |= jax.tree.map(lambda one, other: (one + other) / 2, *both)
    values = {k: np.asarray(v, np.float64).reshape(9, draws) for k, v in bits.items()}
    return request.param, exact, {k: v * 2 * np.log(2) for k, v in values.items()}


@pytest.mark.parametrize("name", ["nll_truncated_normal", "nelbo_truncated_normal"])
def test_truncated_normal_bounds_lie_above_by_what_their_theory_says(bounds, name):
    radius, exact, nats = bounds
    of_one, error = nats[name].mean(axis=1), nats[name].std(axis=1) / nats[name].shape[1] ** 0.5
    assert (np.abs(of_one - exact[:, 1]) < 4 * error + 0.01).all()
    assert (of_one > exact[:, 0] - 4 * error - 0.005).all()
    gap = exact[:, 1] - exact[:, 0]
    assert (gap > 0.02).any() if radius == 1 else (gap < 0.05).all()


def test_more_draws_close_the_gap(bounds):
    radius, exact, nats = bounds
    draws, bits = nats["nll_truncated_normal"], 1 / (2 * np.log(2))
    gaps = []
    for count in (1, 10, 100):
        groups = draws.reshape(9, -1, count) * bits
        of_groups = np.stack(
            [likelihood.importance_weighted(groups[i].T, dims=2) for i in range(9)]
        )
        gaps.append(np.mean(of_groups / bits, axis=1) - exact[:, 0])
    means = [gap.mean() for gap in gaps]
    if radius == 1:
        assert means[0] > 0.02 and abs(means[2]) < 0.3 * means[0] and means[1] < 0.5 * means[0]
    assert abs(means[2]) < 0.01


@pytest.mark.parametrize("name", ["vpsde", "vesde"])
def test_the_bound_from_x_eps_has_the_integral_of_its_formula(name):
    # For s = -κ x with a κ that is nobody's score, E over x_t = a x_ε + b z is known.
    sde, eps, dims, count = SDES[name], 1e-3, 4, 400_000
    x_eps = jnp.broadcast_to(jnp.array([0.3, -0.8, 0.1, 0.5]).reshape(1, 2, 2, 1), (count, 2, 2, 1))

    def kappa(t):
        return 0.6 / (0.2 + sde.std(t) ** 2)

    def score(x, t):
        return -sde_lib.expand(kappa(t), x) * x

    u = (jnp.arange(count) + 0.5) / count
    z = jax.random.normal(jax.random.key(0), x_eps.shape)
    values = np.asarray(likelihood.nelbo_of_x_eps(sde, score, x_eps, eps, u, z), np.float64)
    gamma = jnp.linspace(sde.gamma(eps), sde.gamma(1.0), 20_001)
    t = jnp.clip(sde.inverse_gamma(gamma), eps, 1)
    a, b, k, std = (
        np.asarray(f, np.float64) for f in (*sde.transition(eps, t), kappa(t), sde.std(t))
    )
    square = a**2 * float(jnp.sum(x_eps[0] ** 2)) + b**2 * dims
    integrand = 0.5 * std**2 * (k**2 * square - 2 * k * dims)
    exact = np.trapezoid(integrand, np.asarray(gamma, np.float64))
    error = values.std() / count**0.5
    assert error < 0.02 * abs(exact)
    assert abs(values.mean() - exact) < 4 * error + 2e-3 * abs(exact)


def test_the_radius_of_a_cell_and_the_epsilon_of_a_radius():
    sde = SDES["vpsde"]
    assert abs(float(likelihood.cell_radius(sde, 1e-5, 2 / 255)) - 3.92) < 0.01
    eps = likelihood.largest_eps(sde, 2 / 255)
    np.testing.assert_allclose(likelihood.cell_radius(sde, eps, 2 / 255), 3, rtol=1e-4)
    assert likelihood.largest_eps(sde_lib.VESDE(0.01, 50.0), 1 / 255) is None
