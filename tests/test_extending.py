"""The examples of docs/extending.md, as they stand there: what they say of themselves holds."""

import functools
import importlib
import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

import build
import datasets
import likelihood
import losses
import sampling
import sde_lib
import train_step
from configs.errors import UserError
from configs.saved import as_recorded
from configs.shapes import size_factor
from configs.validate import validate
from data.batches import in_order
from experiments.sweep import load_sweep
from models import networks
from models import utils as mutils
from runtime.workdir import claim_workdir
from tests.helpers import (
    environment_of,
    loss_fn_of,
    score_model,
    step_fn_of,
    times_of_step,
    tiny_config,
)
from tests.test_losses import LinearModel, step_losses_and_grads, toy_config, training_steps
from tests.test_sampling import COUNT, DATA, check_moments, exact_flow, sampling_config

ROOT = pathlib.Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.S)
TIMES = np.geomspace(1e-5, 1, 2001).astype(np.float32)
ANGLE = np.arccos(0.01)
TINY = """

whole_config = get_config


def get_config():
    config = whole_config()
    config.model.update(nf=8, ch_mult=(1,), attn_resolutions=())
    config.optim.warmup = 1
    config.training.update(batch_size=8, n_iters=3, log_freq=1, snapshot_sampling=False)
    config.training.update(snapshot_freq=100, snapshot_freq_for_preemption=100)
    config.sampling.update(num_steps=3, n_images=8)
    return config
"""


@pytest.fixture(scope="module", autouse=True)
def registries():
    """As they were, afterwards."""
    kept = {name: dict(entries) for name, entries in build.REGISTRIES.items()}
    yield
    for name, entries in build.REGISTRIES.items():
        entries.clear()
        entries.update(kept[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has mine/my_config.py and mine/my_sweep.py, of the documentation."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "mine").mkdir()
    (folder / "mine" / "my_config.py").write_text("\n".join(BLOCKS[:-1]))
    (folder / "mine" / "my_sweep.py").write_text(BLOCKS[-1])
    (folder / "mine" / "tiny.py").write_text("\n".join(BLOCKS[:-1]) + TINY)
    return folder


@pytest.fixture(scope="module", autouse=True)
def mine(folder, registries):
    """The config file, imported; it has registered what it defines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module("mine.my_config")


@pytest.fixture(scope="module")
def sde():
    return sde_lib.SDES["cosine"]()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.findall(r"\w+", block)[-1])
def test_each_block_stands_alone(block):
    exec(compile(block, "docs/extending.md", "exec"), {"__name__": "block"})


def test_the_config_is_valid(mine):
    setup = build.set_up(mine.get_config())
    assert type(setup.sde).__name__ == "CosineSDE"


# The SDE


def exact(t):
    """α and σ in float64."""
    angle = ANGLE * np.asarray(t, np.float64)
    return np.cos(angle), np.sin(angle)


def test_the_sde_keeps_its_digits_in_float32(sde):
    # A rounding of t = 1 to float32 is one of α there, of 1e-5 of it.
    alpha, std = exact(TIMES)
    np.testing.assert_allclose(sde.mean_coeff(TIMES), alpha, rtol=2e-5)
    np.testing.assert_allclose(sde.std(TIMES), std, rtol=1e-6)
    np.testing.assert_allclose(sde.gamma(TIMES), 2 * np.log(std / alpha), rtol=2e-6, atol=5e-5)
    np.testing.assert_allclose(sde.inverse_gamma(sde.gamma(TIMES)), TIMES, rtol=2e-6)
    np.testing.assert_allclose(sde.mean_coeff(1.0), 0.01, rtol=2e-5)


def test_drift_and_diffusion_are_those_of_mean_and_std(sde):
    # By differences of the float64 α and σ: f = (log α)', g² = (σ²)' - 2 f σ², γ' = g²/σ².
    t, h = np.geomspace(1e-5, 0.99, 50), 1e-6
    (before, std_before), (after, std_after) = exact(t * (1 - h)), exact(t * (1 + h))
    drift = np.log(after / before) / (2 * h * t)
    np.testing.assert_allclose(sde.drift_coeff(t), drift, rtol=1e-4, atol=1e-4)
    g2 = (std_after**2 - std_before**2) / (2 * h * t) - 2 * drift * exact(t)[1] ** 2
    np.testing.assert_allclose(sde.diffusion(t) ** 2, g2, rtol=1e-4)
    slope = 2 * np.log(std_after / after * before / std_before) / (2 * h * t)
    np.testing.assert_allclose((sde.diffusion(t) / sde.std(t)) ** 2, slope, rtol=1e-4)
    integral = scipy.integrate.quad(
        lambda s: float(sde.diffusion(np.exp(s)) / sde.std(np.exp(s))) ** 2 * np.exp(s),
        np.log(1e-3),
        0.0,
        epsrel=1e-6,
    )[0]
    np.testing.assert_allclose(sde.importance_normalizer(1e-3), integral, rtol=1e-5)


@pytest.mark.parametrize(("s", "t"), [(1e-5, 2e-5), (1e-4, 0.01), (0.3, 0.3001), (0.5, 1.0)])
def test_transitions_compose_to_the_marginal(sde, s, t):
    s, t = np.float32(s), np.float32(t)
    a, b = (np.asarray(v, np.float64) for v in sde.transition(s, t))
    (alpha_s, std_s), (alpha_t, std_t) = exact(s), exact(t)
    np.testing.assert_allclose(a * alpha_s, alpha_t, rtol=2e-5)
    np.testing.assert_allclose(b**2, std_t**2 - (alpha_t / alpha_s * std_s) ** 2, rtol=2e-5)


def test_the_base_class_gives_an_sde_the_unbounded_time(sde):
    alpha, std = exact(TIMES)
    gamma = np.log((std**2 + 1e-3) / alpha**2)
    time = np.asarray(sde.unbounded_time(TIMES, 1e-3))
    np.testing.assert_allclose(time, (gamma - gamma[0]) / (gamma[-1] - gamma[0]), atol=5e-6)
    vp = sde_lib.VPSDE()  # whose own formula is the same, without the rounding of σ
    generic = functools.partial(sde_lib.SDE._stabilized_gamma, vp)
    np.testing.assert_allclose(
        generic(TIMES, 1e-3), vp._stabilized_gamma(TIMES, 1e-3), rtol=1e-5, atol=1e-6
    )
    config = tiny_config(sde="cosine", unbounded_parametrization=True)
    validate(config, 1, build.REGISTRIES)
    time_cond = score_model(config, sde, None).time_cond(TIMES)
    np.testing.assert_allclose(time_cond, 999 * time, rtol=1e-6)


def test_bits_of_a_gaussian_under_the_sde_are_exact(sde):
    config, x = tiny_config(truncation_time=1e-3), DATA.sample(10_000)
    config.eval.update(rtol=1e-5, atol=1e-5)

    def make_score_fn(_):
        return DATA.score_fn(sde)

    bits = likelihood.get_nll_fn(config, sde, make_score_fn)(None, jax.random.key(0), x)
    exact_bits = DATA.nats(x) / (4 * np.log(2)) + 7
    assert abs(bits["nll"].mean() - exact_bits.mean()) < 0.01
    assert abs(bits["nll_without_residual"].mean() - exact_bits.mean()) < 0.01


class Exploding(sde_lib.VESDE):
    """A new SDE of VE's kind."""


def test_an_sde_says_itself_whether_it_is_of_ves_kind(monkeypatch):
    monkeypatch.setitem(sde_lib.SDES, "mine", lambda config: Exploding(0.01, 5.0))
    config = tiny_config(sde="mine")
    config.data.centered = False
    config.model.update(parametrization="noise", scale_by_sigma=True, embedding_type="fourier")
    validate(config, 1, build.REGISTRIES)
    t = jnp.array([0.2, 0.7])
    sde = Exploding(0.01, 5.0)
    score_of = score_model(config, sde, mutils.create_model(config))
    np.testing.assert_array_equal(score_of.time_cond(t), sde.std(t))
    config.training.sde = "cosine"
    with pytest.raises(UserError, match="scale_by_sigma is for VE"):
        validate(config, 1, build.REGISTRIES)


# The weighting


@pytest.mark.parametrize("sde_name", ["vpsde", "vesde", "cosine"])
def test_min_snr_weights_the_error_of_the_predicted_data(sde_name):
    sde = sde_lib.get_sde(tiny_config(sde=sde_name))
    rng = np.random.default_rng(0)
    t = jnp.asarray(np.geomspace(1e-2, 1, 64), jnp.float32)
    x0, z = (jnp.asarray(rng.standard_normal((64, 2, 2, 1)), jnp.float32) for _ in range(2))

    def score_fn(x, t):
        return jnp.sin(x)

    weight = losses.WEIGHTINGS["min_snr_5"](sde, t)
    loss = losses.score_matching_loss(score_fn, sde, x0, t, z, weight)
    x_t = losses.perturb(sde, x0, t, z)
    error = losses.sum_image((sde.denoise(x_t, t, score_fn(x_t, t)) - x0) ** 2)
    snr = np.asarray((sde.mean_coeff(t) / sde.std(t)) ** 2)
    assert (snr > 5).any() and (snr < 5).any()
    np.testing.assert_allclose(loss, 0.5 * np.minimum(snr, 5) * error, rtol=1e-3)


@pytest.mark.slow
def test_training_uses_the_weighting():
    # Of the same draws, an image's loss changes by the ratio of the weights at its time.
    images = jnp.asarray(np.random.default_rng(0).integers(0, 17, (8, 2, 2, 1)), jnp.uint8)
    params, values = {"a": jnp.array(0.3), "b": jnp.array(0.1)}, {}
    for name in ("", "min_snr_5"):
        config = toy_config("fixed", 1, likelihood=False, importance=True)
        config.training.weighting = name
        sde = sde_lib.get_sde(config)
        loss_fn = loss_fn_of(config, sde, LinearModel(), 17, train=True)
        values[name] = loss_fn(params, losses.step_key(config.seed, 3), images, jnp.arange(8))[0]
    _, t = times_of_step(config, sde, 3)
    ratio = np.minimum(1, 5 * np.exp(np.asarray(sde.gamma(t), np.float64)))
    assert ratio.min() < 1
    np.testing.assert_allclose(values["min_snr_5"] / values[""], ratio, rtol=1e-4)


# The prior


def prior_config(truncation, log_mean=-2.0):
    config = toy_config(truncation, 1, likelihood=True, importance=True)
    config.training.prior = "log_normal"
    with config.unlocked():
        config.training.update(log_mean=log_mean, log_std=1.0)
    return config


@pytest.mark.slow
def test_the_priors_icdf_cdf_and_draws_agree(mine):
    config = mine.get_config()
    prior = build.get_prior(config)
    u = np.linspace(0, 1, 1001).astype(np.float32)
    tau = np.asarray(prior.icdf(u))
    assert tau.dtype == np.float32 and (np.diff(tau) > 0).all()
    np.testing.assert_allclose(tau[[0, -1]], [1e-3, 1], rtol=1e-5)
    np.testing.assert_allclose(prior.cdf(tau), u, atol=1e-6)
    ends = scipy.stats.norm.cdf(np.log([1e-3, 1]), -4, 1.5)
    expected = (scipy.stats.norm.cdf(np.log(TIMES), -4, 1.5) - ends[0]) / (ends[1] - ends[0])
    np.testing.assert_allclose(prior.cdf(TIMES), np.clip(expected, 0, 1), atol=1e-6)
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.vmap(build.get_objective(config, sde_lib.get_sde(config)).draw_truncation)(keys)
    test = scipy.stats.kstest(np.asarray(drawn, float), lambda t: np.asarray(prior.cdf(t)))
    assert test.pvalue > 1e-3


def test_soft_truncation_by_the_prior_equals_its_equivalent_weight():
    # Of the expected loss and its gradient.
    values = {
        "soft": step_losses_and_grads(prior_config("soft"), 20_000),
        "weight": step_losses_and_grads(prior_config("equivalent_weight"), 20_000),
        "other": step_losses_and_grads(prior_config("equivalent_weight", log_mean=-3.0), 20_000),
    }
    mean = {name: value.mean(0) for name, value in values.items()}
    stderr = {name: value.std(0) / np.sqrt(len(value)) for name, value in values.items()}

    def deviation(name):
        return np.abs(mean["soft"] - mean[name]) / np.hypot(stderr["soft"], stderr[name])

    assert (deviation("weight") < 4).all()
    assert deviation("other")[0] > 8  # the test can tell another prior


# The network


def test_the_network_is_built_from_its_fields_and_its_images_may_have_any_size(mine):
    config, x = mine.get_config(), jax.random.normal(jax.random.key(0), (3, 5, 7, 1))
    config.model.update(nf=8, depth=2, parametrization="velocity", sigma_data=0.5)
    model, sde, t = mutils.create_model(config), sde_lib.get_sde(config), jnp.array([0.1, 0.5, 0.9])
    params = mutils.init_params(model, x.shape[1:], jax.random.key(1))
    assert model.depth == 2 and size_factor(config) == 1
    # Its last layer is 0 at first, which is exact for N(0, σ_d² I).
    score = mutils.get_score_fn(config, sde, model, params)(x, t)
    variance = (sde.mean_coeff(t) * 0.5) ** 2 + sde.std(t) ** 2
    np.testing.assert_allclose(score, -x / sde_lib.expand(variance, x), rtol=1e-5)
    params["Conv_3"] = jax.tree.map(jnp.ones_like, params["Conv_3"])
    x, times = x[:1].repeat(2, axis=0), jnp.array([0.1, 0.9])
    output = model.apply({"params": params}, x, 999 * times, train=True)
    assert jnp.abs(output[0] - output[1]).max() > 1e-3  # it is told the time


def test_a_network_that_is_told_no_labels_says_so(mine):
    config = mine.get_config()
    config.model.num_classes = 10
    with pytest.raises(UserError, match=r"model\.name=conv_stack takes no labels"):
        build.set_up(config)


@pytest.mark.parametrize(("section", "field"), [("model", "depth"), ("sampling", "churn")])
def test_a_field_that_is_missing_is_named(mine, section, field):
    config = mine.get_config()
    with config.unlocked():
        del config[section][field]
    with pytest.raises(UserError, match=rf" takes {field}, which config\.{section} .*unlocked"):
        build.set_up(config)


class Grey(nn.Module):
    """Gives one channel less than its input has."""

    @nn.compact
    def __call__(self, x, time_cond, train=False, dropout_keys=None):
        return nn.Conv(1, (1, 1))(x)[..., :0]


class WithoutTrain(nn.Module):
    @nn.compact
    def __call__(self, x, time_cond):
        return nn.Conv(1, (1, 1))(x)


@pytest.mark.parametrize(
    ("network", "line"),
    [
        (Grey, r"^model\.name 'own': the network gives \(8, 8, 0\) for images of \(8, 8, 1\)"),
        (WithoutTrain, r"^model\.name 'own' with .* can't be trained: .*argument 'train'"),
    ],
)
def test_a_network_that_can_not_be_trained_is_told_at_the_start(monkeypatch, network, line):
    monkeypatch.setitem(networks.NETWORKS, "own", networks.Network(network))
    config = tiny_config()
    config.model.update(name="own", parametrization="velocity")
    with pytest.raises(UserError, match=line):
        build.set_up(config)


OF_THREE_CHANNELS = """
import flax.linen as nn
from configs.vp import digits_st
from models import networks

class Own(nn.Module):
    @nn.compact
    def __call__(self, x, time_cond, train=False, dropout_keys=None):
        return nn.Conv(3, (1, 1))(x)

networks.NETWORKS["own"] = networks.Network(Own)

def get_config():
    config = digits_st.get_config()
    config.model.name = "own"
    return config
"""


@pytest.mark.slow
def test_it_is_told_where_main_reads_the_config_file_first(tmp_path):
    (tmp_path / "own.py").write_text(OF_THREE_CHANNELS)
    command = [sys.executable, ROOT / "main.py", "--config=own.py", "--workdir=run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment_of(1), capture_output=True)
    line = "error: model.name 'own': the network gives (8, 8, 3) for images of (8, 8, 1)\n"
    assert done.returncode == 2 and done.stderr.decode() == line
    assert not (tmp_path / "run").exists()


def test_an_objective_gives_a_loss_for_each_image(monkeypatch):
    def mean_of_all(sde):
        return lambda score_fn, key, images, index, train: (jnp.zeros(()), jnp.zeros(()))

    monkeypatch.setitem(losses.OBJECTIVES, "own", mean_of_all)
    config = tiny_config(objective="own")
    with pytest.raises(UserError, match=r"'own' must give a loss for each image, \(N,\), and"):
        build.set_up(config)


# The objective


def test_an_objective_of_ones_own_trains():
    config = toy_config("soft", 1, likelihood=True, importance=True)
    config.training.objective = "pseudo_huber"
    config.optim.update(lr=0.1, warmup=0)
    assert build.objective_in_words(config) == "vpsde, pseudo_huber objective"
    sde, optimizer = sde_lib.get_sde(config), build.get_optimizer(config)
    params = {"a": jnp.array(3.0), "b": jnp.array(1.0)}
    state = train_step.TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))
    step_fn = step_fn_of(config, sde, LinearModel(), optimizer, 17)
    step = jax.jit(jax.vmap(step_fn, axis_name=train_step.AXIS))
    images = jnp.asarray(np.random.default_rng(0).integers(0, 17, (1, 1, 64, 2, 2, 1)), jnp.uint8)
    packed = jax.tree.map(lambda x: x[None], train_step.pack_state(state))
    values = []
    for _ in range(20):
        packed, metrics = step(packed, images, jnp.arange(64)[None])
        values.append(float(metrics["loss"][0, 0]))
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:5])
    objective = build.get_objective(config, sde)
    assert objective.for_test(4) is objective


# The optimiser and the schedule


def test_the_schedule_goes_up_and_down(mine):
    schedule = train_step.SCHEDULES["linear"](2.0, 10, 110)
    values = [float(schedule(step)) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(values, [0, 1, 2, 1, 0], atol=1e-6)
    text = build.optimizer_in_words(mine.get_config())
    assert text == "Lion, linear learning rate of 0.0003 after 100 steps of warm-up"


def test_the_optimiser_steps_by_the_sign_and_leaves_frequencies_alone():
    config = tiny_config()
    config.optim.update(optimizer="Lion", lr=0.25, warmup=0, weight_decay=0.5)
    params = {"w": jnp.array(10.0), "GaussianFourierProjection_0": {"W": jnp.ones(2)}}
    states = training_steps(
        lambda params, x: 3 * params["w"] + 0 * x, params, 2, optimizer=build.get_optimizer(config)
    )
    assert [float(state.params["w"]) for state, _ in states] == [8.5, 7.1875]  # 10 - (1 + 5)/4 …
    for state, _ in states:
        np.testing.assert_array_equal(state.params["GaussianFourierProjection_0"]["W"], 1)


# The samplers


def sample_with(sde, churn=None, **options):
    config = sampling_config(options.pop("method"), truncation_time=1e-4, **options)
    config.model.num_scales = 200
    with config.unlocked():
        config.sampling.churn = churn
    sample_fn = build.get_sampling_fn(config, sde, lambda _: DATA.score_fn(sde), COUNT)
    return sample_fn(None, jax.random.key(0))


@pytest.mark.parametrize("sde_name", ["cosine", "vpsde", "vesde"])
def test_the_stochastic_sampler_samples_a_gaussian(sde_name):
    sde = sde_lib.get_sde(tiny_config(sde=sde_name))
    x, nfe = sample_with(sde, churn=20.0, method="edm_stochastic", num_steps=100)
    assert nfe == 201
    check_moments(x, slack=0.015)


def test_without_churn_the_stochastic_sampler_is_heuns(sde):
    x, nfe = sample_with(sde, churn=0.0, method="edm_stochastic", num_steps=20)
    z = sampling.normal(jax.random.key(0), x.shape, 20)
    heun, heun_nfe = sampling.heun_sample(sde, DATA.score_fn(sde), z, num_steps=20, eps=1e-4)
    assert nfe == heun_nfe
    np.testing.assert_allclose(x, heun, atol=2e-4)
    churned, _ = sample_with(sde, churn=20.0, method="edm_stochastic", num_steps=20)
    assert jnp.abs(churned - heun).max() > 0.5


def test_ddim_follows_the_ode(sde):
    x, nfe = sample_with(sde, method="pc", predictor="ddim", corrector="none")
    assert nfe == 200
    check_moments(x, slack=0.05)  # of first order
    times = sampling.noise_ratio_grid(sde, 1e-3, 2000)
    z, score_fn = DATA.sample(64, seed=3), DATA.score_fn(sde)

    def step(i, x):
        move = sampling.PREDICTORS["ddim"]()
        return move(sampling.Step(sde, score_fn, times[i], times[i + 1]), x, None)[0]

    x = jax.lax.fori_loop(0, 2000, step, z)
    np.testing.assert_allclose(np.asarray(x).reshape(64, 4), exact_flow(sde, z, 1e-3), atol=5e-3)


# The whole of it


def test_a_sweep_has_the_new_names(folder):
    sweep = load_sweep(str(folder / "mine" / "my_sweep.py"))
    assert len({run.config_hash for run in sweep.runs}) == len(sweep.runs) == 9
    for run in sweep.runs[:3]:
        build.set_up(run.config())
    assert sweep.runs[1].config().training.log_mean == -6.0


def test_a_sweep_file_can_define_things_itself(folder):
    path = folder / "whole.py"  # annotations as text make dataclasses look for their module
    path.write_text("from __future__ import annotations\n" + "\n".join(BLOCKS[:-2]) + BLOCKS[-1])
    for _ in range(2):
        sweep = load_sweep(str(path))
    assert type(build.set_up(sweep.runs[0].config()).sde).__module__ == "sweep_file"


def main(*args, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *args],
        cwd=cwd,
        env=environment_of(1),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_main_trains_and_samples(folder):
    args = ["--config=mine/tiny.py", f"--workdir={folder}/run"]
    trained = main(*args, "--mode=train", cwd=folder)
    assert trained.returncode == 0, trained.stderr
    assert "cosine, min_snr_5 weighting, uniform time, soft truncation, log_normal prior" in (
        trained.stderr
    )
    assert "k = " not in trained.stderr
    assert "optimiser: Lion, linear learning rate" in trained.stderr
    sampled = main(*args, "--mode=sample", "--config.sampling.churn=1", cwd=folder)
    assert sampled.returncode == 0, sampled.stderr
    assert np.load(folder / "run" / "samples" / "samples.npz")["samples"].shape == (8, 8, 8, 1)


def test_a_field_of_ones_own_is_compared_when_a_run_goes_on(tmp_path):
    config = tiny_config()
    claim_workdir(as_recorded(config), tmp_path / "without", record=True)
    with config.unlocked():
        config.training.log_std = 1.5
    claim_workdir(as_recorded(config), tmp_path / "with", record=True)
    claim_workdir(as_recorded(config), tmp_path / "with", record=False)
    with pytest.raises(UserError, match=r"training\.log_std is None there and 1\.5 here"):
        claim_workdir(as_recorded(config), tmp_path / "without", record=False)
    config.training.log_std = 2.0
    with pytest.raises(UserError, match=r"training\.log_std is 1\.5 there and 2\.0 here"):
        claim_workdir(as_recorded(config), tmp_path / "with", record=False)


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--config.training.sde=cosin", "vpsde, subvpsde, vesde, reciprocal_vesde, cosine"),
        ("--config.training.weighting=min_snr", "likelihood, variance, min_snr_5"),
        ("--config.training.prior=lognormal", "velocity, log_normal"),
        ("--config.training.objective=EDM", "score_matching, edm, pseudo_huber"),
        ("--config.optim.optimizer=lion", "Adam, AdamW, Lion"),
        ("--config.optim.schedule=exponential", "constant, cosine, inverse_sqrt, linear"),
        ("--config.sampling.method=edm", "pc, ode, heun, dpm_solver, edm_stochastic"),
        ("--config.sampling.predictor=DDIM", "ancestral_sampling, ddim"),
    ],
)
def test_a_misspelt_name_is_refused_with_those_there_are(mine, flag, line):
    config = mine.get_config()
    field, value = flag.removeprefix("--config.").split("=")
    section, name = field.split(".")
    config[section][name] = value
    with pytest.raises(UserError) as error:
        validate(config, 1, build.REGISTRIES)
    assert f"{field} is {value!r}; it must be one of" in str(error.value)
    assert line in str(error.value)


@pytest.mark.slow
def test_mistakes_in_a_config_file_are_one_line(folder):
    misspelt = main("--config=mine/tiny.py", "--config.training.prior=lognormal", cwd=folder)
    (folder / "mine" / "broken.py").write_text("import losses\n\nlosses.WEIGHTS['a'] = None\n")
    broken = main("--config=mine/broken.py", cwd=folder)
    for result, line in (
        (
            misspelt,
            "training.prior is 'lognormal'; it must be one of power, sigmoid, velocity, "
            "log_normal\n",
        ),
        (broken, "no attribute 'WEIGHTS' (mine/broken.py, line 3)\n"),
    ):
        assert result.returncode == 2 and result.stderr.endswith(line), result.stderr
        assert result.stderr.count("\n") == 1
    assert not (folder / "runs").exists()


def sign_config(path):
    config = tiny_config()
    config.data.update(dataset="sign_mnist", path=str(path), image_size=32)
    config.data.cache = False
    return config


def test_a_data_set_of_ones_own_is_read(tmp_path):
    rng = np.random.default_rng(0)
    rows = {"train": rng.integers(0, 256, (48, 785)), "test": rng.integers(0, 256, (24, 785))}
    letters = [*range(9), *range(10, 25)]  # without J
    for split, values in rows.items():
        values[:, 0] = np.resize(letters, len(values))
        header = ",".join(["label", *(f"pixel{i}" for i in range(1, 785))])
        file = tmp_path / f"sign_mnist_{split}.csv"
        np.savetxt(file, values, "%d", ",", header=header, comments="")
    config = sign_config(tmp_path)
    build.set_up(config)
    data = datasets.load_data(config)
    assert data.train.classes == tuple("ABCDEFGHIKLMNOPQRSTUVWXY")
    assert "27,455 training and 7,172 test images as published" in data.train.notes[0]
    for split, values in rows.items():
        found = in_order(getattr(data, split))
        inner = found["image"][:, 2:-2, 2:-2, 0]
        np.testing.assert_array_equal(inner, values[:, 1:].reshape(-1, 28, 28))
        np.testing.assert_array_equal(found["label"], np.resize(range(24), len(values)))


def test_files_that_a_data_set_of_ones_own_lacks_are_named(tmp_path):
    with pytest.raises(UserError, match=r"Sign Language MNIST is read from; bring sign_mnist_tra"):
        datasets.load_data(sign_config(tmp_path))
    config = sign_config(tmp_path)
    config.data.dataset = "sing_mnist"
    with pytest.raises(UserError, match=r"data.dataset is 'sing_mnist'; .* sign_mnist"):
        build.set_up(config)
