import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import build
import controllable_generation
import datasets
import losses
import sampling
import sde_lib
from configs.data import data_spec
from configs.errors import UserError
from data import pixels
from models import utils as mutils
from official import import_checkpoint
from tests.helpers import GOLDEN, Gaussian, float64, golden_config, nhwc, optimised, tiny_config

SDES = {
    "vp": sde_lib.VPSDE(),
    "subvp": sde_lib.SubVPSDE(),
    "ve": sde_lib.VESDE(0.01, 50.0),
    "rve": sde_lib.RVESDE(0.01, 50.0),
}
SDE = SDES["vp"]
DATA = Gaussian((2, 2, 1), [0.02, 0.1, 0.3, 0.6], [0.5, -0.3, 0.0, 0.2])
COUNT = 20_000
DATA_NOISE = jax.random.normal(jax.random.key(1000), (COUNT, 2, 2, 1))


def sampling_config(method, **options):
    config = tiny_config()
    config.data.image_size = 2
    config.sampling.update(method=method, **options)
    return config


def exact_flow(sde, x, eps):
    """The probability-flow ODE's solution at eps from x at T, (N, D).

    In the eigenbasis it scales each coordinate by the ratio of marginal deviations.
    """

    def marginal(t):
        return np.sqrt(
            np.asarray(sde.mean_coeff(t)) ** 2 * DATA.variances + np.asarray(sde.std(t)) ** 2
        )

    def center(t):
        return np.asarray(sde.mean_coeff(t)) * DATA.mean

    start = (np.asarray(x).reshape(len(x), -1) - center(1.0)) @ DATA.basis
    return (start * marginal(eps) / marginal(1.0)) @ DATA.basis.T + center(eps)


def check_moments(x, slack):
    """Mean and covariance are the data's, within 4.5 standard errors and a bias of `slack`."""
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    scale = np.sqrt(np.diag(DATA.cov))
    mean_error = np.abs(x.mean(0) - DATA.mean) / scale
    assert mean_error.max() < 4.5 / np.sqrt(len(x)) + slack
    cov_error = np.abs(np.cov(x, rowvar=False) - DATA.cov) / np.outer(scale, scale)
    assert cov_error.max() < 4.5 * np.sqrt(2 / len(x)) + slack


@pytest.mark.slow
@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize(
    ("predictor", "corrector"),
    [
        ("euler_maruyama", "none"),
        ("reverse_diffusion", "langevin"),
        ("ancestral_sampling", "none"),
        ("ancestral_sampling", "ald"),
    ],
)
def test_predictor_corrector_samples_a_gaussian(name, predictor, corrector):
    sde = SDES[name]
    config = sampling_config("pc", predictor=predictor, corrector=corrector, snr=0.05)
    config.sampling.truncation_time = 1e-3 if name != "rve" else 1e-5
    config.model.num_scales = 500
    sample_fn = build.get_sampling_fn(config, sde, lambda _: DATA.score_fn(sde), 8000)
    x, nfe = optimised(functools.partial(sample_fn, None))(jax.random.key(0))
    assert nfe == (500 if corrector == "none" else 999)
    check_moments(x, slack=0.03)


@pytest.mark.parametrize(
    ("method", "options", "most"),
    [
        ("pc", {"predictor": "ancestral_sampling", "corrector": "ald"}, 1e-5),
        ("pc", {"predictor": "reverse_diffusion", "corrector": "none"}, 1e-5),
        ("heun", {"num_steps": 5}, 1e-5),
        ("dpm_solver", {"num_steps": 5}, 1e-5),
        ("ode", {"rtol": 1e-5, "atol": 1e-5}, 1e-3),  # the batch shares its steps
    ],
)
def test_a_sample_depends_on_its_key_and_not_on_its_batch(method, options, most):
    config = sampling_config(method, **options)
    config.sampling.truncation_time = 1e-3
    config.model.num_scales = 20

    def draw(start, count):
        keys = sampling.sample_keys(jax.random.key(5), start, count)
        score_fn = DATA.score_fn(SDE)
        return build.get_sampling_fn(config, SDE, lambda _: score_fn, count)(None, keys)[0]

    x = draw(0, 10)
    assert np.abs(x[6:9] - draw(6, 3)).max() < most
    assert np.abs(x[6:9] - x[:3]).max() > 0.01


@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion"])
def test_probability_flow_predictor_follows_the_ode(predictor):
    z = SDE.prior_std() * DATA.sample(64, seed=3)
    times = SDE.time_grid(1e-3, 2000)

    def body(i, x):
        predict = sampling.PREDICTORS[predictor](probability_flow=True)
        noise = jnp.full_like(x, jnp.nan)  # must not be used
        score_fn = DATA.score_fn(SDE)
        return predict(sampling.Step(SDE, score_fn, times[i], times[i + 1]), x, noise)[0]

    x = jax.lax.fori_loop(0, len(times) - 1, body, z)
    np.testing.assert_allclose(np.asarray(x).reshape(64, 4), exact_flow(SDE, z, 1e-3), atol=0.02)


def test_the_corrector_alone_keeps_a_distribution():
    t = jnp.asarray(0.5)
    x = losses.perturb(SDE, DATA.sample(COUNT), jnp.full(COUNT, t), DATA_NOISE)
    before = np.cov(np.asarray(x).reshape(COUNT, -1), rowvar=False)
    correct, step = sampling.langevin(0.05), sampling.Step(SDE, DATA.score_fn(SDE), t, t - 1e-3)
    for i in range(20):
        x, _ = correct(step, x, jax.random.normal(jax.random.key(i), x.shape))
    after = np.cov(np.asarray(x).reshape(COUNT, -1), rowvar=False)
    np.testing.assert_allclose(after, before, atol=0.03)


class Release:
    """The release's discretisation: N noise scales, indexed by floor(t (N - 1))."""

    def __init__(self, sde, num_scales):
        self.sde, self.num = sde, num_scales

    def __getattr__(self, name):
        return getattr(self.sde, name)

    def transition(self, s, t):
        del s
        i = jnp.floor(t * (self.num - 1)).astype(int)
        if isinstance(self.sde, sde_lib.VPSDE):
            betas = jnp.linspace(self.sde.beta_min, self.sde.beta_max, self.num) / self.num
            return jnp.sqrt(1 - betas[i]), jnp.sqrt(betas[i])
        sigmas = jnp.geomspace(self.sde.sigma_min, self.sde.sigma_max, self.num)
        lower = jnp.where(i == 0, 0, sigmas[i - 1])
        return jnp.ones(()), jnp.sqrt(sigmas[i] ** 2 - lower**2)


GOLDEN_SAMPLERS = np.load(GOLDEN / "samplers.npz")


@functools.cache
def golden_score_fn(name):
    """The score of a golden model, compiled once."""
    config = golden_config(name)
    params, _, _ = import_checkpoint.load(GOLDEN / f"{name}.pth", config)
    model = mutils.create_model(config)
    return jax.jit(mutils.get_score_fn(config, sde_lib.get_sde(config), model, params))


@pytest.mark.parametrize("name", sorted({k.rsplit(".", 1)[0] for k in GOLDEN_SAMPLERS}))
def test_golden_samplers(name):
    def get(field):
        return GOLDEN_SAMPLERS[f"{name}.{field}"]

    model_name, predictor, corrector = name.split(".")
    config = golden_config(model_name)
    num, snr = int(get("N")), float(get("snr"))
    sde, score_fn = Release(sde_lib.get_sde(config), num), golden_score_fn(model_name)
    rng, shape = np.random.default_rng(int(get("seed"))), get("x").shape

    def draw():
        return nhwc(rng.standard_normal(shape).astype(np.float32))

    x = mean = sde.prior_std() * draw()
    for t in jnp.linspace(1, float(get("eps")), num):
        step = sampling.Step(sde, score_fn, t, t - 1 / num)
        if corrector != "none":
            x, _ = sampling.CORRECTORS[corrector](snr)(step, x, draw())
        x, mean = sampling.PREDICTORS[predictor]()(step, x, draw())
    for value, field in ((x, "x"), (mean, "x_mean")):
        expected = nhwc(get(field))
        assert np.abs(value - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("solver", [sampling.heun_sample, sampling.dpm_solver_sample])
def test_solvers_converge_to_the_exact_flow_at_second_order(solver, name):
    # In float64: the slope of log error over log steps, between 20 and 320.
    sde = SDES[name]
    eps = 1e-5 if name == "rve" else 1e-3
    steps, errors = np.array([20, 40, 80, 160, 320]), []
    with float64():
        z = sde.prior_std() * jnp.asarray(DATA.sample(64, seed=3), jnp.float64)
        exact = exact_flow(sde, z, eps)
        for num in steps:
            score_fn = DATA.score_fn(sde)
            x, nfe = solver(sde, score_fn, z, num_steps=num, eps=eps, noise_removal=False)
            assert nfe == num * (2 if solver is sampling.heun_sample else 1)
            errors.append(np.abs(np.asarray(x).reshape(64, 4) - exact).max())
    slope = np.polyfit(np.log(steps[1:]), np.log(errors[1:]), 1)[0]
    assert -2.4 < slope < -1.7
    assert errors[-1] < 2e-3


@pytest.mark.parametrize("method", ["ode", "heun", "dpm_solver"])
@pytest.mark.parametrize(
    "name", [name if name == "vp" else pytest.param(name, marks=pytest.mark.slow) for name in SDES]
)
def test_samplers_along_the_ode_sample_a_gaussian(name, method):
    sde = SDES[name]
    config = sampling_config(method, num_steps=100, rtol=1e-5, atol=1e-5)
    config.sampling.truncation_time = 1e-4 if name == "ve" else 1e-5
    sample_fn = build.get_sampling_fn(config, sde, lambda _: DATA.score_fn(sde), COUNT)
    x, nfe = optimised(functools.partial(sample_fn, None))(jax.random.key(0))
    assert {"heun": nfe == 201, "dpm_solver": nfe == 101, "ode": 30 < nfe < 1000}[method]
    check_moments(x, slack=0.015)  # of N(0, σ_max²) as the prior of VE


@pytest.mark.parametrize("name", SDES)
def test_ode_follows_its_exact_solution(name):
    sde = SDES[name]
    eps = 1e-5 if name == "rve" else 1e-3
    z = sde.prior_std() * DATA.sample(64, seed=3)
    x, _ = sampling.ode_sample(
        sde, DATA.score_fn(sde), z, eps=eps, rtol=1e-6, atol=1e-6, noise_removal=False
    )
    np.testing.assert_allclose(np.asarray(x).reshape(64, 4), exact_flow(sde, z, eps), atol=5e-5)


@pytest.mark.parametrize("method", ["ode", "dpm_solver"])
def test_the_states_that_are_kept_lie_on_the_exact_flow(method):
    options = {"truncation_time": 1e-3, "noise_removal": False}
    options |= {"num_steps": 400} if method == "dpm_solver" else {"rtol": 1e-6, "atol": 1e-6}
    chain = sampling.Chain(SDE, 1e-3, 5)
    sampler = chain.watch(sampling.SAMPLERS[method](**options))
    draw = sampling.get_sampling_fn(sampler, SDE, lambda _: DATA.score_fn(SDE), (8, 2, 2, 1))
    x, _ = draw(None, jax.random.key(0))
    jax.effects_barrier()
    assert chain.states.shape == (5, 8, 2, 2, 1)
    first, last = (SDE.gamma(jnp.array(t)) for t in (SDE.T, 1e-3))
    z = sampling.normal(jax.random.key(0), x.shape)
    for state, gamma in zip(chain.states, np.linspace(first, last, 5), strict=True):
        t = SDE.inverse_gamma(gamma)
        size = float(jnp.hypot(SDE.mean_coeff(t), SDE.std(t)))
        # Of the adaptive solver's few evaluations none may be near a level.
        atol = 0.02 if method == "dpm_solver" or gamma in (first, last) else 0.2
        np.testing.assert_allclose(state.reshape(8, 4) * size, exact_flow(SDE, z, t), atol=atol)


def test_spherical_interpolation():
    a, b = jax.random.normal(jax.random.key(0), (2, 4, 3, 3, 2))
    a, b = a.at[0].set(b[0]), 2 * b  # the first two are parallel

    def norm(v):
        return np.linalg.norm(np.asarray(v).reshape(4, -1), axis=1)

    np.testing.assert_allclose(sampling.slerp(a, b, 0.0), a, atol=1e-6)
    np.testing.assert_allclose(sampling.slerp(a, b, jnp.ones(4)), b, atol=1e-6)
    np.testing.assert_allclose(sampling.slerp(a, b, 0.25)[0], 1.25 * a[0], rtol=1e-5)
    # Between unit vectors: on the sphere, and equal shares are equal angles.
    a, b = (v / norm(v)[:, None, None, None] for v in (a, b))
    points = [sampling.slerp(a, b, share) for share in (0, 0.3, 0.6, 0.9)]
    np.testing.assert_allclose([norm(p) for p in points], 1, rtol=1e-5)
    steps = [norm(p - q) for p, q in itertools.pairwise(points)]
    np.testing.assert_allclose(steps[1:], [steps[0]] * 2, rtol=1e-4, atol=1e-6)
    assert steps[0][1:].min() > 0.1


def test_denoising_is_the_posterior_mean():
    t, x0 = 0.3, DATA.sample(200_000)
    z = jax.random.normal(jax.random.key(1), x0.shape)
    x = SDE.mean_coeff(t) * x0 + SDE.std(t) * z
    error = np.asarray(sampling.denoise(SDE, DATA.score_fn(SDE), x, t) - x0).reshape(len(x0), -1)
    # The error of E[x_0 | x_t] is uncorrelated with x_t, and has the posterior's variance.
    flat = np.asarray(x).reshape(len(x0), -1)
    assert np.abs(error.T @ flat / len(x0)).max() < 5e-3
    alpha2, var = SDE.mean_coeff(t) ** 2, SDE.std(t) ** 2
    posterior = DATA.variances * var / (alpha2 * DATA.variances + var)
    np.testing.assert_allclose(((error @ DATA.basis) ** 2).mean(0), posterior, rtol=0.02)


@pytest.mark.slow
def test_a_solve_that_fails_gives_nan():
    y, _ = sampling.solve_ode(lambda t, y, _: y / 0.0, jnp.ones(2), 0.0, 1.0, 1e-3, 1e-3)
    assert np.isnan(np.asarray(y)).all()


@pytest.mark.slow
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral_sampling"])
def test_inpainting_draws_from_the_conditional_distribution(predictor):
    # Of a Gaussian, the unknown given the known is a Gaussian with known moments.
    known = DATA.sample(1, seed=5)
    images = jnp.repeat(known, 4000, 0)
    mask = jnp.array([[0.0, 1.0], [0.0, 1.0]])[None, :, :, None]
    config = sampling_config("pc", predictor=predictor, corrector="langevin", task="inpaint")
    config.sampling.update(snr=0.1, n_steps_each=3, truncation_time=1e-3)
    config.model.num_scales = 500
    complete = controllable_generation.get_completion_fn(
        build.sampling_method(config), SDE, lambda _: DATA.score_fn(SDE)
    )
    complete = optimised(functools.partial(complete, None))
    x = np.asarray(complete(jax.random.key(0), images, mask)).reshape(4000, 4)
    np.testing.assert_array_equal(x[:, [0, 2]], np.asarray(images).reshape(4000, 4)[:, [0, 2]])
    seen, hidden = [0, 2], [1, 3]
    gain = DATA.cov[np.ix_(hidden, seen)] @ np.linalg.inv(DATA.cov[np.ix_(seen, seen)])
    mean = DATA.mean[hidden] + gain @ (x[0, seen] - DATA.mean[seen])
    cov = DATA.cov[np.ix_(hidden, hidden)] - gain @ DATA.cov[np.ix_(seen, hidden)]
    np.testing.assert_allclose(x[:, hidden].mean(0), mean, atol=0.08)
    np.testing.assert_allclose(np.cov(x[:, hidden], rowvar=False), cov, atol=0.05)


def test_colorization_keeps_the_grey():
    data = Gaussian((2, 2, 3), 0.3, 0.1)
    images = data.sample(8, seed=2)
    config = sampling_config("pc", predictor="euler_maruyama", task="colorize")
    config.sampling.truncation_time = 1e-3
    config.model.num_scales = 100
    complete = controllable_generation.get_completion_fn(
        build.sampling_method(config), SDE, lambda _: data.score_fn(SDE), colors=True
    )
    x = complete(None, jax.random.key(0), images, jnp.zeros(()))
    np.testing.assert_allclose(x.mean(-1), images.mean(-1), atol=1e-5)
    assert jnp.abs(x - images).max() > 0.3  # the colours are new


@pytest.mark.parametrize("name", SDES)
def test_a_large_ancestral_step_draws_from_the_posterior_of_a_point(name):
    # If all data are one point, p(x_s | x_t) is normal, by Bayes from x_s | x_0 and x_t | x_s.
    sde, point = SDES[name], 0.3
    t, s, _ = np.asarray(sde.time_grid(1e-5 if name == "rve" else 1e-3, 3), np.float64)
    a, b = (float(c) for c in sde.transition(s, t))
    alpha, std = float(sde.mean_coeff(s)), float(sde.std(s))

    def score(x, t):
        return (sde_lib.expand(sde.mean_coeff(t), x) * point - x) / sde_lib.expand(
            sde.std(t) ** 2, x
        )

    z = np.linspace(-2, 2, 9).reshape(9, 1, 1, 1)
    x = a * alpha * point + np.hypot(a * std, b) * (z[::-1] + 0.5)
    ours, mean = sampling.ancestral_sampling()(
        sampling.Step(sde, score, t, s), jnp.asarray(x, jnp.float32), jnp.asarray(z, jnp.float32)
    )
    precision = 1 / std**2 + (a / b) ** 2
    exact = (alpha * point / std**2 + a * x / b**2) / precision
    np.testing.assert_allclose(mean, exact, atol=1e-4 * std)
    np.testing.assert_allclose(ours, exact + z / np.sqrt(precision), atol=1e-4 * std)


def test_each_step_of_a_chain_has_its_own_noise_and_is_counted():
    def add(step, x, z):
        return x + z, x

    def subtract(step, x, z):
        return x - z, x

    options = {"predictor": add, "corrector": subtract, "num_steps": 6, "n_steps_each": 2}
    x, nfe = sampling.pc_sample(
        SDE, None, jax.random.key(0), (2000, 2, 2, 1), eps=0.1, noise_removal=False, **options
    )
    assert nfe == 5 * 3
    np.testing.assert_allclose(np.var(x), 1 + nfe, rtol=0.06)


def test_what_is_known_is_diffused_to_each_time():
    images, mask = jnp.full((4000, 1, 2, 1), 0.8), np.array([[[[0.0], [1.0]]]])
    constrain, _ = controllable_generation.inpainting(SDE, images, mask)
    x = constrain(jax.random.split(jax.random.key(0), 4000), jnp.full(images.shape, 7.0), 0.3)
    alpha, std = float(SDE.mean_coeff(0.3)), float(SDE.std(0.3))
    assert (x[:, :, 1] == 7).all()
    np.testing.assert_allclose(np.mean(x[:, :, 0]), alpha * 0.8, atol=4.5 * std / 4000**0.5)
    np.testing.assert_allclose(np.std(x[:, :, 0]), std, rtol=0.05)


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("left", (0, 8), (0, 4)),
        ("right", (0, 8), (4, 8)),
        ("top", (0, 4), (0, 8)),
        ("bottom", (4, 8), (0, 8)),
        ("center", (2, 6), (2, 6)),
    ],
)
def test_a_mask_is_the_region_of_its_name(name, rows, columns):
    expected = np.zeros((8, 8))
    expected[slice(*rows), slice(*columns)] = 1
    mask = controllable_generation.read_mask(name, (8, 8), (8, 8))
    np.testing.assert_array_equal(mask[..., 0], expected)


def test_completions_of_all_batches_have_noise_of_their_own():
    config, seen = tiny_config(), []

    def complete(params, keys, images, mask, labels):
        seen.extend(map(tuple, np.asarray(jax.random.key_data(keys)).tolist()))
        return images

    test, preprocessing = (
        datasets.get_dataset(config, "test"),
        pixels.get_preprocessing(data_spec(config)),
    )
    arrays = controllable_generation.complete_test_images(
        complete, {}, test, preprocessing, np.ones((8, 8, 1)), count=12, batch_size=4, seed=0
    )
    assert len(arrays["samples"]) == len(set(seen)) == 12


def test_colours_are_multiplied_in_full_precision():
    key, x = jax.random.key(0), jnp.ones((2, 4, 4, 3))
    constrain, finish = controllable_generation.colorization(SDE, x)
    programs = jax.make_jaxpr(constrain)(key, x, 0.5), jax.make_jaxpr(finish)(x)
    products = [line for p in programs for line in str(p).split("\n") if "precision=" in line]
    assert len(products) >= 4 and all("HIGHEST" in line for line in products)


def test_an_adaptive_solve_of_a_row_does_not_depend_on_the_others():
    sde, rng = sde_lib.VPSDE(), np.random.default_rng(0)
    z = jnp.asarray(rng.standard_normal((6, 3)), jnp.float32)

    def score_fn(x, t):  # of data at ±0.01, a harder ODE for some rows than for others
        alpha, variance = sde.mean_coeff(t)[:, None], sde.std(t)[:, None] ** 2
        return (0.01 * alpha * jnp.tanh(0.01 * alpha * x / variance) - x) / variance

    options = {"eps": 1e-3, "rtol": 1e-3, "atol": 1e-3}
    solve = jax.jit(functools.partial(sampling.ode_sample, sde, score_fn, **options))
    whole, _ = solve(z)
    alone = jnp.concatenate([solve(row[None])[0] for row in z])
    np.testing.assert_allclose(whole, alone, atol=1e-6)
    np.testing.assert_allclose(solve(z[::-1])[0], whole[::-1], atol=1e-6)


@pytest.mark.parametrize(
    ("colour", "told"),
    [((255, 255, 255, 0), "has transparency; save it"), ((9, 9, 9, 255), "has no white pixel")],
)
def test_masks_that_do_not_say_what_to_fill_in_are_refused(tmp_path, colour, told):
    mask = Image.new("RGBA", (8, 8), (255, 255, 255, 255) if colour[3] == 0 else colour)
    mask.paste(colour, (0, 0, 4, 8))
    mask.save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=told):
        controllable_generation.read_mask(str(tmp_path / "mask.png"), (8, 8), (8, 8))
