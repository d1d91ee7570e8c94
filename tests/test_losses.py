import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
import scipy.stats

import build
import datasets
import losses
import sde_lib
import train_step
from configs import fields
from configs.data import data_spec
from configs.errors import UserError
from configs.validate import validate
from data import pixels
from data.batches import train_batches
from models import utils as mutils
from official import import_checkpoint
from tests.helpers import (
    GOLDEN,
    Gaussian,
    float64,
    golden_config,
    loss_fn_of,
    nhwc,
    optimised,
    random_params,
    small_networks,
    step_fn_of,
    tiny_config,
)

KS = [0, 0.5, 0.8, 0.9, 0.999, 1 - 1e-7, 1, 1 + 1e-7, 1.001, 1.1, 1.2, 2, 3, 8]
SDE = sde_lib.VPSDE()


def exact_icdf(u, k, eps):
    """In extended precision, by the formula as it stands; k = 1 by its limit."""
    u, eps, m = np.longdouble(u), np.longdouble(eps), np.longdouble(k) - 1
    if abs(m) < 1e-6:  # second order in m: better than cancelling
        log_range = -np.log(eps)
        return np.exp(np.log(eps) + u * log_range - m * log_range**2 * u * (1 - u) / 2)
    return eps * ((1 - u) + u * eps**m) ** (-1 / m)


@pytest.mark.parametrize("k", ["0", "0.5", "0.8", "0.9", "1", "1.1", "1.2", "2", "3"])
@pytest.mark.parametrize("eps", ["1e-05", "0.001"])
def test_golden_prior(k, eps):
    golden = np.load(GOLDEN / "sde.npz")
    prior = losses.TruncationPrior(float(k), float(eps))
    with float64():  # the golden q are float64, and u → 1 is sensitive to their digits
        tau = prior.icdf(jnp.asarray(golden["q"]))
    np.testing.assert_allclose(tau, golden[f"tau_k{k}_eps{eps}"], rtol=1e-9)


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_prior_icdf_keeps_its_digits_in_float32(k, eps):
    u = np.linspace(0, 1, 4001).astype(np.float32)
    tau = losses.TruncationPrior(k, eps).icdf(u)
    assert tau.dtype == np.float32
    np.testing.assert_allclose(tau, exact_icdf(u, k, eps).astype(np.float64), rtol=1e-5)


@pytest.mark.parametrize("k", KS)
def test_prior_icdf_cdf_pdf_and_samples_agree(k):
    prior = losses.TruncationPrior(k, 1e-3)
    u = np.linspace(0.01, 0.99, 99)
    with float64():
        np.testing.assert_allclose(prior.cdf(prior.icdf(u)), u, rtol=1e-6)
        t = np.geomspace(1e-3, 1, 20_001)
        mass = scipy.integrate.cumulative_simpson(np.asarray(prior.pdf(t)) * t, x=np.log(t))
        np.testing.assert_allclose(mass, prior.cdf(t)[1:], atol=1e-6)
    samples = np.asarray(prior.icdf(jax.random.uniform(jax.random.key(1), (20_000,))))
    assert scipy.stats.kstest(samples, lambda t: np.asarray(prior.cdf(t))).pvalue > 1e-3


def test_prior_with_infinite_k_is_the_fixed_truncation():
    prior = losses.TruncationPrior(np.inf, 1e-3)
    np.testing.assert_array_equal(prior.icdf(jnp.array([0.0, 0.5, 1.0])), jnp.full(3, 1e-3))
    np.testing.assert_array_equal(prior.cdf(jnp.array([1e-4, 1e-3, 0.5])), [0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="at least 0"):
        losses.TruncationPrior(-1, 1e-3)


GOLDEN_LOSSES = np.load(GOLDEN / "losses.npz")


@pytest.mark.parametrize("name", ["vp_ddpmpp", "vp_uddpmpp", "ve_ncsnpp", "rve_uncsnpp"])
def test_golden_losses(name):
    config = golden_config(name)
    params, _, _ = import_checkpoint.load(GOLDEN / f"{name}.pth", config)

    def get(field):
        return GOLDEN_LOSSES[f"{name}.{field}"]

    sde, model = sde_lib.get_sde(config), mutils.create_model(config)
    score_fn = jax.jit(mutils.get_score_fn(config, sde, model, params))
    modes = {k.split(".")[1] for k in GOLDEN_LOSSES if k.startswith(name) and k.count(".") == 2}
    assert modes >= {"variance", "likelihood"}
    for mode in modes:
        t = jnp.asarray(get(f"{mode}.t"))
        # The official importance mode weights by σ² times the normaliser of g²/σ².
        weight = losses.WEIGHTINGS["likelihood" if mode == "likelihood" else "variance"](
            sde, t
        ) * get(f"{mode}.Z")
        if mode == "importance":
            z_tau = sde.importance_normalizer(get("tau"))
            np.testing.assert_allclose(z_tau, get(f"{mode}.Z"), rtol=1e-5)
        loss = losses.score_matching_loss(score_fn, sde, nhwc(get("x")), t, nhwc(get("z")), weight)
        # The release's float32 loses digits of UDDPM++'s labels and of RVE's g.
        rtol = {"vp_uddpmpp": 3e-4, "rve_uncsnpp": 1e-3}.get(name, 1e-5)
        np.testing.assert_allclose(loss, get(f"{mode}.half_weighted_sq"), rtol=rtol)
        np.testing.assert_allclose(loss / 768, get(f"{mode}.official_mean"), rtol=rtol)
        # The release halves the sum twice.
        np.testing.assert_allclose(loss / 2, get(f"{mode}.official_sum"), rtol=rtol)


@pytest.mark.parametrize(
    ("tau", "importance"), [(1e-5, True), (1e-2, True), (1e-2, False), (0.5, True), (0.5, False)]
)
def test_drawn_times_integrate_without_bias(tau, importance):
    u = jax.random.uniform(jax.random.key(2), (100_000,))
    t, inverse_density = losses.draw_times(SDE, u, tau, importance)
    t, inverse_density = np.asarray(t, np.float64), np.asarray(inverse_density, np.float64)
    values = np.cos(3 * t) / t * inverse_density
    exact = scipy.integrate.quad(lambda s: np.cos(3 * np.exp(s)), np.log(tau), 0)[0]
    stderr = values.std() / np.sqrt(len(values))
    assert abs(values.mean() - exact) < 4 * stderr
    assert stderr < 0.05 * abs(exact)  # sharp enough to see a wrong density


class LinearModel:
    """The smallest network: a x + b."""

    def apply(self, variables, x, labels, train=False, dropout_keys=None):
        del labels, train, dropout_keys
        return variables["params"]["a"] * x + variables["params"]["b"]


def toy_config(truncation, k, likelihood, importance):
    config = tiny_config(
        truncation=truncation,
        k=float(k),
        truncation_time=1e-2,
        likelihood_weighting=likelihood,
        importance_sampling=importance,
    )
    config.data.image_size = 2
    return config


def step_losses_and_grads(config, steps, distinct=4):
    """The (loss, gradient by a, gradient by b) of each of many steps with 4 images, (steps, 3)."""
    sde = sde_lib.get_sde(config)
    loss_fn = loss_fn_of(config, sde, LinearModel(), 17, train=True)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 17, (4, 2, 2, 1)), jnp.uint8)
    images = jnp.resize(images[:distinct], images.shape)

    def one(step):
        def mean_loss(params):
            return loss_fn(params, losses.step_key(0, step), images, jnp.arange(4))[0].mean()

        value, grads = jax.value_and_grad(mean_loss)({"a": jnp.array(0.3), "b": jnp.array(0.1)})
        return jnp.stack([value, grads["a"], grads["b"]])

    return np.asarray(optimised(jax.vmap(one))(jnp.arange(steps)), np.float64)


@pytest.mark.parametrize("likelihood", [True, False])
@pytest.mark.parametrize("importance", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "k", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_soft_truncation_equals_the_equivalent_weight_in_expectation(k, importance, likelihood):
    steps = 30_000
    values = {
        name: step_losses_and_grads(toy_config(name, k, likelihood, importance), steps)
        for name in ("soft", "equivalent_weight", "fixed")
    }
    mean = {name: v.mean(0) for name, v in values.items()}
    stderr = {name: v.std(0) / np.sqrt(steps) for name, v in values.items()}

    def deviation(name):
        error = np.hypot(stderr[name], stderr["equivalent_weight"])
        return np.abs(mean[name] - mean["equivalent_weight"]) / error

    assert (deviation("soft") < 4).all(), deviation("soft")
    # The test can tell: the fixed truncation, another objective, is many standard errors away.
    assert deviation("fixed")[0] > 8


def pmapped_step(config, num_devices):
    setup, data = build.set_up(config), datasets.load_data(config)
    step_fn = step_fn_of(config, setup.sde, setup.model, setup.optimizer, 17)
    devices = jax.devices()[:num_devices]
    state = train_step.pack_state(setup.init_state())
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_devices, *x.shape)), state)
    batches = train_batches(data.train, config.training.batch_size, config.seed)
    return state, jax.pmap(step_fn, axis_name="batch", devices=devices), batches


def run_steps(config, num_devices, steps):
    with small_networks():
        state, step_fn, batches = pmapped_step(config, num_devices)
    history = []
    for _ in range(steps):
        batch = next(batches)

        def shard(x):
            return x.reshape(num_devices, -1, *x.shape[1:])

        images = shard(batch["image"])[:, None]
        state, metrics = step_fn(state, images, shard(batch["index"]))
        history.append(jax.tree.map(lambda x: np.asarray(x[:, 0]), metrics))
    state = train_step.unpack_state(jax.tree.map(lambda x: x[0], state))
    return jax.tree.map(np.asarray, state), history


@pytest.fixture(scope="module")
def on_one_device():
    return run_steps(tiny_config(), 1, 4)


@pytest.fixture(scope="module")
def on_four_devices():
    return run_steps(tiny_config(), 4, 4)


def test_tau_is_one_number_a_step_across_devices(on_four_devices):
    _, history = on_four_devices
    taus = np.stack([metrics["tau"] for metrics in history])
    assert taus.shape == (4, 4)
    assert (taus == taus[:, :1]).all()
    assert len(np.unique(taus[:, 0])) == 4  # and a new one in every step


@pytest.mark.slow
def test_every_time_of_a_step_is_above_its_tau():
    config = toy_config("soft", 1, True, True)
    seen = []

    class Recorder(LinearModel):
        def apply(self, variables, x, labels, train=False, dropout_keys=None):
            seen.append(np.asarray(labels) / 999)
            return x

    loss_fn = loss_fn_of(config, SDE, Recorder(), 17, train=True)
    images, index = jnp.zeros((64, 2, 2, 1), jnp.uint8), jnp.arange(64)
    for step in range(20):
        _, tau = loss_fn({"a": 0.0, "b": 0.0}, losses.step_key(0, step), images, index)
        assert seen[-1].min() >= tau * (1 - 1e-6)
        assert len(np.unique(seen[-1])) > 1


def test_devices_do_not_change_the_run(on_one_device, on_four_devices):
    (one, one_history), (four, four_history) = on_one_device, on_four_devices
    for a, b in zip(one_history, four_history, strict=True):
        np.testing.assert_allclose(b["loss"], np.full(4, a["loss"][0]), rtol=1e-5)
    # Adam divides by the gradient's own size, so rounding of tiny gradients shows at 1e-4 of lr.
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
def test_micro_batches_do_not_change_the_run(on_one_device):
    config = tiny_config()
    config.optim.num_micro_batch = 2
    _, history = run_steps(config, 1, 4)
    for a, b in zip(on_one_device[1], history, strict=True):
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
        np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-4)
        assert b["tau"] == a["tau"]


def test_ema_follows_the_official_rule():
    np.testing.assert_allclose(
        train_step.ema_decay(0.9999, jnp.arange(1, 4)), [2 / 11, 3 / 12, 4 / 13]
    )
    np.testing.assert_allclose(train_step.ema_decay(0.9, 1000), 0.9)


def test_optimizer_warms_up_from_zero_and_clips():
    config = tiny_config()
    config.optim.update(lr=0.1, warmup=4, grad_clip=1.0, eps=1e-8)
    optimizer = build.get_optimizer(config)
    params = {"w": jnp.zeros(2)}
    opt_state = optimizer.init(params)
    sizes = []
    for _ in range(6):
        updates, opt_state = optimizer.update({"w": jnp.array([30.0, 40.0])}, opt_state, params)
        sizes.append(float(-updates["w"][0]))
    # A constant gradient gives Adam's step its full size, lr · min(step/warmup, 1).
    np.testing.assert_allclose(sizes, [0.0, 0.025, 0.05, 0.075, 0.1, 0.1], rtol=1e-4)
    mean = optax.tree_utils.tree_get(opt_state, "mu")["w"] / (1 - 0.9**6)
    np.testing.assert_allclose(mean, [0.6, 0.8], rtol=1e-5)


def test_weight_decay_is_added_to_the_clipped_gradient():
    config = tiny_config()
    config.optim.update(grad_clip=1.0, weight_decay=0.5)
    optimizer = build.get_optimizer(config)
    params = {"w": jnp.array([2.0, -4.0])}
    _, opt_state = optimizer.update({"w": jnp.array([30.0, 40.0])}, optimizer.init(params), params)
    mean = optax.tree_utils.tree_get(opt_state, "mu")["w"] / (1 - 0.9)
    np.testing.assert_allclose(mean, [0.6 + 1.0, 0.8 - 2.0], rtol=1e-5)


def test_adamw_is_optaxs():
    config = tiny_config()
    config.optim.update(optimizer="AdamW", lr=0.1, warmup=0, grad_clip=-1.0, weight_decay=0.5)
    params = {"w": jnp.array([2.0, -4.0])}
    updates = []
    for optimizer in (
        build.get_optimizer(config),
        optax.adamw(0.1, b1=config.optim.beta1, eps=config.optim.eps, weight_decay=0.5),
    ):
        state, given, of_steps = optimizer.init(params), params, []
        for grads in ([3.0, 4.0], [-1.0, 2.0]):
            update, state = optimizer.update({"w": jnp.array(grads)}, state, given)
            given = optax.apply_updates(given, update)
            of_steps.append(update["w"])
        updates.append(of_steps)
    np.testing.assert_allclose(*updates, rtol=1e-6)
    np.testing.assert_allclose(updates[0][0], [-0.1 - 0.1, -0.1 + 0.2], rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        ("constant", (0, 5, 10, 1000), (0, 1, 2, 2)),
        ("cosine", (0, 5, 10, 60, 110), (0, 1, 2, 1, 0)),
        ("inverse_sqrt", (0, 5, 10, 40, 160), (0, 1, 2, 2, 1)),
    ],
)
@pytest.mark.parametrize("warmup", [10, 0])
def test_schedules_warm_up_and_fall(schedule, steps, expected, warmup):
    config = tiny_config(n_iters=110 if warmup else 100)
    config.optim.update(schedule=schedule, lr=2.0, warmup=warmup, decay_start=40)
    validate(config, 1, build.REGISTRIES)
    learning_rate = fields.call(train_step.SCHEDULES[schedule], config, "optim", "training")
    if warmup:
        np.testing.assert_allclose([learning_rate(s) for s in steps], expected, atol=1e-6)
    else:
        assert float(learning_rate(0)) == 2.0


def test_a_cosine_needs_steps_after_its_warm_up():
    config = tiny_config(n_iters=12)
    config.optim.update(schedule="cosine", warmup=12)
    with pytest.raises(UserError, match=r"n_iters is 12; optim\.schedule=cosine ends there"):
        validate(config, 1, build.REGISTRIES)


@pytest.mark.parametrize("sde", ["subvpsde", "vesde", "reciprocal_vesde"])
def test_soft_truncation_is_the_equivalent_weight_on_every_sde(sde):
    values = {}
    for name in ("soft", "equivalent_weight", "fixed"):
        config = toy_config(name, 0.0, likelihood=True, importance=True)
        config.training.sde = sde
        config.model.update(sigma_min=0.1, sigma_max=5.0)
        values[name] = step_losses_and_grads(config, 30_000)

    def deviation(name):
        a, b = values[name], values["equivalent_weight"]
        error = np.hypot(a.std(0), b.std(0)) / np.sqrt(len(a))
        return np.abs(a.mean(0) - b.mean(0)) / error

    assert (deviation("soft") < 4).all(), deviation("soft")
    assert deviation("fixed").max() > 8


def mixed_config(**options):
    config = toy_config("fixed", 1.0, likelihood=True, importance=True)
    config.training.update(mixed=True, ddpm_weight=5.0)
    config.training.update(options)
    return config


def test_mixed_is_the_sum_of_its_two_halves():
    # The mean over the batch: the likelihood objective, and 5 times the variance objective.
    mixed, likelihood, variance = (
        step_losses_and_grads(config, 20_000, distinct=1)
        for config in (
            mixed_config(),
            toy_config("fixed", 1.0, likelihood=True, importance=True),
            toy_config("fixed", 1.0, likelihood=False, importance=False),
        )
    )
    expected = likelihood.mean(0) + 5 * variance.mean(0)
    parts = [v.std(0) / np.sqrt(len(v)) for v in (mixed, likelihood, 5 * variance)]
    assert (np.abs(mixed.mean(0) - expected) < 4 * np.sqrt(sum(p**2 for p in parts))).all()
    assert np.abs(mixed.mean(0) - likelihood.mean(0)).max() > 0.1 * np.abs(likelihood.mean(0)).max()


@pytest.mark.slow
def test_balanced_brings_the_second_half_to_the_first_ones_size():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 17, (8, 2, 2, 1)), jnp.uint8)
    params = {"a": jnp.array(0.3), "b": jnp.array(0.1)}

    def run(config):
        loss_fn = loss_fn_of(config, SDE, LinearModel(), 17, train=False)

        def mean(p):
            return loss_fn(p, losses.step_key(0, 5), images, jnp.arange(8))[0]

        return mean(params), jax.jacobian(mean)(params)["a"]

    plain, plain_grad = run(mixed_config(ddpm_weight=1.0))
    balanced, balanced_grad = run(mixed_config(ddpm_weight=1.0, balanced=True))
    ratio = np.mean(plain[0::2] / plain[1::2])
    np.testing.assert_allclose(balanced[0::2], plain[0::2], rtol=1e-6)
    np.testing.assert_allclose(balanced[1::2], plain[1::2] * ratio, rtol=1e-5)
    # The ratio is a constant: no gradient flows through it.
    np.testing.assert_allclose(balanced_grad[1::2], plain_grad[1::2] * ratio, rtol=1e-4)


@pytest.mark.usefixtures("small_network_here")
@pytest.mark.slow
def test_mixed_training_is_the_same_on_several_devices():
    config = tiny_config(mixed=True, balanced=True, ddpm_weight=1.0, stratified_times=False)
    _, one = run_steps(config, 1, 4)
    _, four = run_steps(config, 4, 4)
    for a, b in zip(one, four, strict=True):
        np.testing.assert_allclose(a["loss"][0], b["loss"][0], rtol=1e-4)


def test_the_lossless_decoder_is_a_distribution_over_levels():
    # For each pixel the probabilities of all levels sum to 1, and the likely one is near the mean.
    data, num_levels = Gaussian((1, 1, 1), 0.2, 0.1), 9
    lowest, width = pixels.Preprocessing(num_levels, True, "none", False).level_grid
    levels = jnp.linspace(-1, 1, num_levels)[:, None, None, None]
    np.testing.assert_allclose(levels[1] - levels[0], width, rtol=1e-6)
    for eps in (1e-5, 1e-3, 0.1, 1.0):
        x_eps = SDE.mean_coeff(eps) * 0.3 + SDE.std(eps) * 0.5
        # The noise that brings each level to the same x_ε.
        z = (x_eps - SDE.mean_coeff(eps) * levels) / SDE.std(eps)
        nll = losses.discrete_decoder_loss(data.score_fn(SDE), SDE, levels, eps, z, lowest, width)
        assert jnp.isfinite(nll).all()
        np.testing.assert_allclose(jnp.exp(-nll).sum(), 1, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 3.0, -8.0, 40.0])
@pytest.mark.parametrize("width", [1e-4, 0.02, 1.0, 30.0])
def test_log_normal_mass_keeps_its_digits(shift, width):
    def mass(low):
        return losses._log_normal_mass(jnp.float32(low), jnp.float32(low) + jnp.float32(width))

    low, high = np.float64(np.float32(shift)), np.float64(np.float32(shift) + np.float32(width))
    if low > 0:
        low, high = -high, -low
    log_cdf = scipy.stats.norm.logcdf
    exact = log_cdf(high) + np.log1p(-np.exp(log_cdf(low) - log_cdf(high)))
    np.testing.assert_allclose(mass(shift), exact, rtol=2e-3, atol=1e-3)
    assert jnp.isfinite(jax.grad(mass)(shift))


@pytest.mark.slow
@pytest.mark.parametrize("dequantization", ["uniform", "lossless"])
def test_reconstruction_loss_is_added_at_tau(dequantization):
    config = toy_config("fixed", 1.0, likelihood=True, importance=True)
    config.data.dequantization = dequantization
    without = step_losses_and_grads(config, 2000)
    config.training.reconstruction_loss = True
    with_it = step_losses_and_grads(config, 2000)
    # The same draws: what is added is the term itself, whose mean is known by other draws.
    added = with_it[:, 0] - without[:, 0]
    images = np.random.default_rng(0).integers(0, 17, (4, 2, 2, 1))
    params = {"a": jnp.array(0.3), "b": jnp.array(0.1)}
    score_fn = mutils.get_score_fn(config, SDE, LinearModel(), params)
    x0 = jnp.asarray(np.tile(images, (500, 1, 1, 1)), jnp.float32) / 16 * 2 - 1
    if dequantization == "uniform":
        noise = np.random.default_rng(1).random((2000, 2, 2, 1))
        x0 = (jnp.asarray(np.tile(images, (500, 1, 1, 1))) + noise) / 17 * 2 - 1
    z = jax.random.normal(jax.random.key(3), x0.shape)
    if dequantization == "uniform":
        term = losses.reconstruction_loss(score_fn, SDE, x0, 1e-2, z)
    else:
        term = losses.discrete_decoder_loss(score_fn, SDE, x0, 1e-2, z, -1.0, 2 / 16)
    term = np.asarray(term, np.float64) / 4
    stderr = np.hypot(added.std() / np.sqrt(2000), term.std() / np.sqrt(2000))
    assert abs(added.mean() - term.mean()) < 5 * stderr
    assert abs(term.mean()) > 4 * stderr
    assert np.isfinite(with_it).all()


@pytest.mark.slow
def test_a_packed_state_comes_back():
    config = tiny_config()
    config.model.update(embedding_type="fourier")
    setup = build.set_up(config)
    state = setup.init_state()
    packed = train_step.pack_state(state)
    assert len(jax.tree.leaves(packed)) < 16
    assert packed.params.fixed.size == config.model.nf  # the Fourier frequencies alone
    again = train_step.unpack_state(packed)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_rematerialisation_changes_nothing_but_memory():
    def value_and_grads(remat):
        config = tiny_config()
        config.model.update(remat=remat, dropout=0.3, init_scale=1.0, attn_resolutions=(8,))
        model = mutils.create_model(config)
        loss_fn = loss_fn_of(config, SDE, model, 17, train=True)
        images = np.random.default_rng(0).integers(0, 17, (8, 8, 8, 1), dtype=np.uint8)

        def mean(p):
            return jnp.mean(loss_fn(p, losses.step_key(0, 1), images, jnp.arange(8))[0])

        params = random_params(config)
        saved = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(mean, p)[1], params))
        memory = sum(x.size * x.dtype.itemsize for x in saved if x.ndim == 4)
        return jax.jit(jax.value_and_grad(mean))(params), memory

    (kept, memory), (again, less) = value_and_grads(False), value_and_grads(True)
    assert jax.tree.structure(kept) == jax.tree.structure(again)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert less < 0.8 * memory


def training_steps(loss, params, count, devices=1, optimizer=None, **options):
    """The states after each of `count` steps on a loss (params, pixels (n,)) → (n,), no network.

    The batch of each step has eight images of one pixel, 0 … 7.
    """

    def objective(params, key, images, index, train):
        return loss(params, images.reshape(-1)), jnp.zeros(())

    optimizer = optimizer or optax.sgd(1.0)
    recipe = train_step.Recipe(
        objective, lambda params: params, optimizer, seed=0, ema_rate=0.999, **options
    )
    step_fn = train_step.get_step_fn(recipe)
    step = jax.jit(jax.vmap(step_fn, axis_name="batch"))
    index = jnp.arange(8).reshape(devices, -1)
    images = index.astype(jnp.float32).reshape(devices, 1, -1, 1, 1, 1)
    first = train_step.TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))
    packed = train_step.pack_state(first)
    packed = jax.tree.map(lambda x: jnp.broadcast_to(x, (devices, *jnp.shape(x))), packed)
    states = []
    for _ in range(count):
        packed, metrics = step(packed, images, index)
        own = jax.tree.map(lambda x: x[-1], (packed, metrics))
        states.append((train_step.unpack_state(own[0]), jax.tree.map(lambda x: x.item(), own[1])))
    return states


def test_the_ema_of_three_training_steps():
    # The weight goes 10, 9, 8, 7; the n-th average has the weights of ema_decay(n).
    states = training_steps(lambda params, x: params["w"] + 0 * x, {"w": jnp.array(10.0)}, 3)
    assert [float(state.params["w"]) for state, _ in states] == [9, 8, 7]
    first = 10 * 2 / 11 + 9 * 9 / 11
    second = first * 3 / 12 + 8 * 9 / 12
    third = second * 4 / 13 + 7 * 9 / 13
    averages = [float(state.ema_params["w"]) for state, _ in states]
    np.testing.assert_allclose(averages, [first, second, third], rtol=1e-6)


@pytest.mark.parametrize(("devices", "micro"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_a_training_step_has_the_mean_gradient_of_the_whole_batch(devices, micro):
    def loss(params, x):
        return params["w"] * x**2

    ((state, metrics),) = training_steps(
        loss, {"w": jnp.array(3.0)}, 1, devices, num_micro_batch=micro
    )
    gradient = np.mean(np.arange(8.0) ** 2)
    np.testing.assert_allclose(state.params["w"], 3 - gradient, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], gradient, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], 3 * gradient, rtol=1e-6)


def test_a_training_step_whose_gradient_alone_is_not_finite_is_skipped():
    def loss(params, x):
        return jnp.sqrt(0 * params["w"]) + x  # whose derivative is 0/0

    ((state, metrics),) = training_steps(loss, {"w": jnp.array(3.0)}, 1)
    assert metrics["skipped"] == 1 and np.isfinite(metrics["loss"])
    assert state.step == 1 and state.params["w"] == state.ema_params["w"] == 3


def test_the_optimizer_does_not_decay_fixed_frequencies():
    config = tiny_config()
    config.optim.update(weight_decay=0.5, warmup=1)
    optimizer = build.get_optimizer(config)
    params = {"GaussianFourierProjection_0": {"W": jnp.ones(2)}, "Conv_0": {"kernel": jnp.ones(2)}}
    for given in (params, train_step.pack(params)):
        nothing, state = jax.tree.map(jnp.zeros_like, given), optimizer.init(given)
        for _ in range(2):  # the first step has a learning rate of 0
            updates, state = optimizer.update(nothing, state, given)
        updates = train_step.pack(updates) if given is params else updates
        assert (updates.fixed == 0).all() and (updates.trained < 0).all()


@pytest.mark.parametrize("field", ["n_jitted_steps", "log_freq", "eval_freq", "snapshot_freq"])
def test_training_steps_of_a_call_end_where_something_is_due(field, monkeypatch):
    monkeypatch.setattr(train_step, "_on_accelerator", lambda: True)
    every = ("n_jitted_steps", "log_freq", "eval_freq", "snapshot_freq")
    config = tiny_config(**dict.fromkeys(every, 12), snapshot_freq_for_preemption=12)
    assert train_step.steps_a_call(build.set_up(config).loop) == 12
    config.training[field] = 4
    assert train_step.steps_a_call(build.set_up(config).loop) == 4


def test_the_residual_is_the_logarithm_of_two_normal_densities():
    # At an ε where α is far from 1.
    eps, data = 0.3, Gaussian((2, 2, 1), 0.2, 0.1)
    x0, z = data.sample(5), jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 2, 1)))
    alpha, std = float(SDE.mean_coeff(eps)), float(SDE.std(eps))
    x_eps = alpha * x0 + std * z
    denoised = SDE.denoise(x_eps, eps, data.score_fn(SDE)(x_eps, jnp.full(5, eps)))
    log_of_encoder = scipy.stats.norm.logpdf(x_eps, alpha * x0, std)
    log_of_decoder = scipy.stats.norm.logpdf(x0, denoised, std / alpha)
    exact = (log_of_encoder - log_of_decoder).sum(axis=(1, 2, 3))
    ours = losses.reconstruction_loss(data.score_fn(SDE), SDE, x0, eps, z)
    np.testing.assert_allclose(ours, exact, rtol=1e-4)


def seen_by_the_objective(train, **training):
    """The (x, t) of each call of the score, and `flip`, for 500 images of four pixels at 0."""
    calls = []

    class Data(pixels.Preprocessing):
        def to_x0(self, images, keys, flip):
            calls.append(flip)
            return jnp.zeros(images.shape)

    config = toy_config("fixed", 1.0, likelihood=True, importance=True)
    config.training.update(training)
    own = dataclasses.asdict(pixels.get_preprocessing(data_spec(config)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "get_preprocessing", lambda *_: Data(**own))
        objective = build.get_objective(config, SDE)

    def score_fn(x, t, keys):
        calls.append((np.asarray(x), np.asarray(t)))
        return -x

    images, index = jnp.zeros((500, 2, 2, 1), jnp.uint8), jnp.arange(500)
    objective(score_fn, losses.step_key(0, 0), images, index, train=train)
    return calls


@pytest.mark.parametrize("train", [True, False])
def test_images_are_flipped_in_training_alone(train):
    assert seen_by_the_objective(train)[0] == train


def test_the_residual_has_noise_of_its_own():
    _, *calls = seen_by_the_objective(False, reconstruction_loss=True)
    (of_loss, of_residual) = (
        (x / np.asarray(SDE.std(t)).reshape(-1, 1, 1, 1)).ravel() for x, t in calls
    )
    np.testing.assert_allclose([of_loss.std(), of_residual.std()], 1, rtol=0.1)
    assert abs(np.corrcoef(of_loss, of_residual)[0, 1]) < 5 / 2000**0.5


def test_the_ratio_of_halves_is_of_pairs_on_all_devices():
    pairs = jnp.array([[3.0, 1.0, 10.0, 2.0], [7.0, 1.0, 9.0, 1.0]])
    first = jnp.array([True, False, True, False])
    ratio = jax.vmap(lambda own: losses.mean_pair_ratio(own, first, "batch"), axis_name="batch")(
        pairs
    )
    np.testing.assert_allclose(ratio, [6, 6])
