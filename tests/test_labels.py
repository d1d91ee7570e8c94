"""Networks that are told labels: embedding, guidance, training, samples of each label, scores."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import build
import datasets
import evaluation
import losses
import run_lib
import sampling
import sde_lib
import train_step
from configs.errors import UserError
from configs.vp import digits_st
from data.batches import Data, in_order
from data.told_labels import sample_labels
from metrics import bits_per_dim, given_images
from models import utils as mutils
from runtime import checkpointing
from runtime.workdir import PartialResults
from tests.helpers import random_params, sample_run, tiny_config

SDE = sde_lib.VPSDE()


def labelled(**training):
    config = tiny_config(**training)
    config.model.num_classes = 10
    return config


def test_a_network_without_labels_has_no_embedding_of_them():
    names = jax.tree_util.tree_flatten_with_path(random_params(tiny_config()))[0]
    told = jax.tree_util.tree_flatten_with_path(random_params(labelled()))[0]
    assert {str(path) for path, _ in told} - {str(path) for path, _ in names} == {
        "(DictKey(key='Embed_0'), DictKey(key='embedding'))"
    }


def test_the_label_changes_the_score_and_no_label_is_one_of_them():
    config = labelled()
    setup, params = build.set_up(config), random_params(config)
    x, t = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.full(4, 0.3)

    @functools.partial(jax.jit, static_argnames="guidance")
    def score_of(labels, guidance):
        return setup.make_score_fn(params, labels, guidance)(x, t)

    def score(classes, guidance=0.0):
        return np.asarray(score_of(jnp.asarray(classes), guidance))

    nothing = np.asarray(score_of(None, 0.0))
    np.testing.assert_allclose(score([10] * 4), nothing, rtol=1e-6, atol=1e-6)
    threes, mixed = score([3] * 4), score([3, 4, 3, 10])
    np.testing.assert_allclose(mixed[[0, 2]], threes[[0, 2]], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mixed[3], nothing[3], rtol=1e-5, atol=1e-5)
    assert np.abs(mixed[1] - threes[1]).max() > 1e-3
    guided = score([3, 4, 3, 10], guidance=2.0)
    np.testing.assert_allclose(guided, mixed + 2 * (mixed - nothing), rtol=1e-3, atol=1e-4)


def test_labels_are_dropped_by_the_image_and_not_by_its_place():
    key, classes = jax.random.key(7), jnp.arange(4000) % 10
    index = jnp.arange(4000)
    told = losses.drop_labels(key, index, classes, 0.1, 10)
    assert float(jnp.mean(told == 10)) == pytest.approx(0.1, abs=0.02)
    assert bool(jnp.all((told == classes) | (told == 10)))
    back = losses.drop_labels(key, index[::-1], classes[::-1], 0.1, 10)[::-1]
    np.testing.assert_array_equal(told, back)
    np.testing.assert_array_equal(losses.drop_labels(key, index, classes, 0.0, 10), classes)


class Mixture:
    """A network's place taken by the exact noise of two Gaussians in a pixel, at -1 and 1."""

    std = 0.1

    def apply(self, variables, x, time_cond, train, dropout_keys, labels):
        del variables, train, dropout_keys
        t = time_cond / 999
        alpha, sigma = (sde_lib.expand(v, x) for v in (SDE.mean_coeff(t), SDE.std(t)))
        variance = alpha**2 * self.std**2 + sigma**2

        def log_density(x, mean):
            return -0.5 * (x - alpha * mean) ** 2 / variance

        def log_of_both(x):
            return jnp.logaddexp(log_density(x, -1.0), log_density(x, 1.0)).sum()

        means = sde_lib.expand(jnp.where(labels == 0, -1.0, 1.0), x)
        known, either = -(x - alpha * means) / variance, jax.grad(log_of_both)(x)
        return -sigma * jnp.where(sde_lib.expand(labels == 2, x), either, known)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_guidance_on_a_mixture_whose_conditional_scores_are_known(guidance):
    config = tiny_config()
    config.model.update(num_classes=2, parametrization="noise")
    labels = jnp.arange(400) % 2
    score_fn = mutils.get_score_fn(config, SDE, Mixture(), {}, labels=labels, guidance=guidance)
    z = jax.random.normal(jax.random.key(0), (400, 1, 1, 1))
    x, _ = sampling.heun_sample(SDE, score_fn, z, num_steps=40, eps=1e-4, noise_removal=False)
    lower, upper = np.asarray(x[::2]).ravel(), np.asarray(x[1::2]).ravel()
    if guidance:  # away from the other label, and narrower
        assert lower.mean() < -1 and upper.mean() > 1 and lower.max() < 0 < upper.min()
        assert upper.std() < 0.1
    else:
        assert upper.mean() == pytest.approx(1, abs=0.02) and lower.mean() == pytest.approx(
            -1, abs=0.02
        )
        assert upper.std() == pytest.approx(0.1, abs=0.015)


def test_labels_of_samples(tmp_path):
    def labels(text, start=0, count=6):
        return sample_labels(text, 10, start, count).tolist()

    assert labels("all", 8) == [8, 9, 0, 1, 2, 3]
    assert labels("none") == [10] * 6 and labels("3") == [3] * 6
    assert labels("0,1,7", 1, 4) == [1, 7, 0, 1]
    (tmp_path / "labels.txt").write_text("5\n6\n")
    assert labels(str(tmp_path / "labels.txt")) == [5, 6, 5, 6, 5, 6]
    for wrong in ("10", "-1", "cats", "", "1;2"):
        with pytest.raises(UserError, match=r"^sampling\.labels"):
            labels(wrong)


@pytest.mark.parametrize(
    "section, fields, problem",
    [
        (
            "sampling",
            {"guidance": 1.0},
            "sampling.guidance is 1.0, and this model is told no labels",
        ),
        ("sampling", {"labels": "3"}, "sampling.labels is '3', and this model is told no labels"),
        ("model", {"num_classes": -2}, "model.num_classes is -2"),
        ("training", {"label_dropout": 1.0}, "training.label_dropout is 1.0"),
    ],
)
def test_what_a_config_cannot_ask_for(section, fields, problem):
    config = digits_st.get_config()
    config[section].update(fields)
    with pytest.raises(UserError, match=f"^config: {problem}"):
        build.set_up(config)


@pytest.mark.parametrize("fields", [{"guidance": 1.0}, {"labels": "none"}])
def test_without_labels_needs_training_without_them(fields):
    config = labelled(label_dropout=0.0)
    build.set_up(config)
    config.sampling.update(fields)
    with pytest.raises(UserError, match="needs a network that was trained without labels, too"):
        build.set_up(config)


def test_images_without_labels_need_training_without_them(tmp_path):
    config = labelled(label_dropout=0.0)
    np.savez(tmp_path / "some.npz", samples=np.zeros((3, 8, 8, 1), np.uint8))
    config.eval.images = str(tmp_path / "some.npz")
    setup = build.set_up(config)
    brought = given_images.given_images(setup)
    with pytest.raises(UserError, match=r"^eval\.images have no labels"):
        evaluation._evaluate_images(setup, tmp_path, [1], *brought)


def test_labels_of_samples_are_read_before_training():
    config = labelled()
    config.sampling.labels = "0,10"
    with pytest.raises(UserError, match=r"sampling\.labels has 10"):
        run_lib.train(config, "unused")


def test_data_with_other_labels_are_refused():
    config = labelled()
    config.model.num_classes = 7
    with pytest.raises(UserError, match=r"^model\.num_classes is 7, and digits has 10 labels; a"):
        run_lib.train(config, "unused")


@pytest.mark.parametrize("told", [True, False])
def test_bits_are_of_an_image_given_its_label(tmp_path, told):
    config, seen = labelled(), []
    config.eval.update(num_test_data=6, batch_size=4)
    data = datasets.load_data(config)
    if not told:  # images that come without labels
        test = dataclasses.replace(data.test, classes=())
        data = Data(test, test)

    def bits(params, keys, image_keys, x, levels, labels):
        seen.append(np.asarray(labels))
        return {name: jnp.zeros(len(x)) for name in ("nll", "nelbo", "nfe")}

    results = PartialResults(tmp_path)
    setup = build.set_up(config)
    bits_per_dim.bits_of_images(
        bits_per_dim.BitsEvaluation(setup, data, results, bits), {"a": np.zeros(1)}
    )
    labels = in_order(data.test, 6)["label"]
    expected = labels if told else np.full(6, 10)
    np.testing.assert_array_equal(np.concatenate([seen[0], seen[1][:2]]), expected)


@pytest.mark.usefixtures("small_network_here", "short_classifier")
@pytest.mark.slow
def test_a_run_with_labels_from_training_to_its_scores(tmp_path, monkeypatch):
    config = tiny_config(n_iters=10, snapshot_freq=10)
    config.model.num_classes = -1  # the data set's
    config.training.snapshot_freq_for_preemption = 5
    config.sampling.update(method="dpm_solver", num_steps=5, n_images=20, batch_size=8)
    config.eval.update(num_samples=40, num_test_data=40, batch_size=20, nelbo_draws=1, nll_steps=32)
    run_lib.train(config, tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model"]["num_classes"] == 10
    config.eval.cache_dir = str(tmp_path)

    def ema(run):
        shape = build.set_up(labelled()).state_shape
        return checkpointing.restore_latest(labelled(), tmp_path / run, shape).ema_params

    # Several steps a call, with images and labels on the device, as on an accelerator.
    monkeypatch.setattr(train_step, "_on_accelerator", lambda: True)
    quick = config.copy_and_resolve_references()
    quick.training.update(log_freq=5, eval_freq=5)
    run_lib.train(quick, tmp_path / "resident")
    monkeypatch.undo()
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(near, ema("run"), ema("resident"))

    # Samples of each label in a row; the same whatever the batch.
    grid = sample_run(config, tmp_path / "run")
    found = dict(np.load(grid.with_suffix(".npz")))
    assert found["labels"].tolist() == list(range(10)) * 2
    config.sampling.update(labels="4", guidance=1.5, n_images=4)
    guided = np.load(sample_run(config, tmp_path / "run").with_suffix(".npz"))
    assert guided["labels"].tolist() == [4] * 4
    assert np.abs(guided["samples"].astype(int) - found["samples"][:4]).max() > 0
    config.sampling.update(task="inpaint", method="pc", n_images=6)
    config.model.num_scales = 5
    sample_run(config, tmp_path / "run")
    config.sampling.update(task="generate", method="dpm_solver", labels="all", guidance=0.0)

    # Scores.
    config.eval.enable_bpd = False
    report = evaluation.evaluate(config, tmp_path / "run")
    assert 0 <= report["label_agreement"] <= 1 and report["label_agreement_stderr"] > 0
