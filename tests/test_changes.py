"""A run whose settings change, and a run that starts from another's weights."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import build
import run_lib
from configs import saved
from configs.errors import UserError
from data.batches import Dataset
from data.told_labels import check_labels
from readers.source import ArraySource
from runtime import checkpointing
from tests.helpers import sample_run, tiny_config
from tests.jobs import assert_identical, state_of

pytestmark = pytest.mark.usefixtures("small_network")


def config_of(n_iters=2, **model):
    config = tiny_config(n_iters=n_iters, snapshot_freq=2, snapshot_freq_for_preemption=2)
    config.model.update(model)
    config.sampling.update(method="dpm_solver", num_steps=2, n_images=4)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_network):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    run_lib.train(config_of(), folder)
    return folder


def copy_of(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_an_optimisers_settings_may_change(run, tmp_path):
    workdir = copy_of(run, tmp_path)
    changes = {"warmup": 0, "weight_decay": 0.1, "beta1": 0.5, "grad_clip": -1.0, "lr": 1e-5}
    for name, value in changes.items():
        config = config_of(4)
        config.optim[name] = value
        with pytest.raises(UserError, match=rf"optim\.{name} is .* go on with it by"):
            run_lib.train(config, workdir)
    config.optim.update(changes)
    sample_run(config, workdir)
    state = run_lib.train(config, workdir, override=True)
    assert int(state.step) == 4 and np.isfinite(jax.tree.leaves(state.params)[0]).all()
    recorded = saved.get_config(workdir).optim
    assert {name: recorded[name] for name in changes} == changes


def test_the_tree_of_the_optimisers_state_is_the_same_for_all_settings():
    params = {"Dense_0": np.ones(3, np.float32)}
    trees = set()
    for change in ({}, {"warmup": 0}, {"weight_decay": 0.1}, {"grad_clip": -1.0}):
        config = config_of()
        config.optim.update(change)
        trees.add(jax.tree.structure(build.get_optimizer(config).init(params)))
    assert len(trees) == 1


def test_a_checkpoint_of_an_optimiser_of_three_parts_has_its_own_shapes(tmp_path):
    optimizer = optax.chain(optax.identity(), optax.scale_by_lion(), optax.scale_by_schedule(abs))
    state = {"opt_state": optimizer.init({"w": np.ones(2, np.float32)})}
    shapes = {checkpointing._name(path): leaf.shape for path, leaf in checkpointing._leaves(state)}
    assert checkpointing._UPDATES in shapes
    checkpointing._check_shapes(tmp_path, shapes, shapes)


def test_checkpoints_of_runs_without_warmup_as_they_used_to_be_open(tmp_path):
    shape = build.set_up(config_of()).state_shape
    state = jax.tree.map(lambda s: np.full(s.shape, 3, s.dtype), shape)
    without = optax.EmptyState()
    old = dataclasses.replace(state, opt_state=(*state.opt_state[:3], without))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "3" / "default", old)
    read = checkpointing.restore(tmp_path, shape, 3)
    assert_identical(read, state)
    assert jax.tree.structure(read) == jax.tree.structure(shape)


def test_a_checkpoint_of_another_network_is_told_by_its_arrays(run):
    other = build.set_up(config_of(nf=12)).state_shape
    with pytest.raises(UserError) as raised:
        checkpointing.restore(run / "checkpoints", other, 2)
    line = str(raised.value)
    assert "is of another network or optimiser: ema_params." in line
    assert "is (8,) there and (12,) here" in line and line.endswith("more") and "\n" not in line


def test_the_weights_alone_are_read_to_sample(run, monkeypatch):
    asked = []
    restore = checkpointing.restore
    monkeypatch.setattr(
        checkpointing, "restore", lambda *args: asked.append(args[1]) or restore(*args)
    )
    sample_run(config_of(), run)
    assert asked[0].params is None and asked[0].opt_state is None


def test_override_to_arrays_takes_their_units_and_records_them_when_it_saves(run, tmp_path):
    workdir = copy_of(run, tmp_path)
    before = (workdir / "config.json").read_bytes()
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "other.npz", images=rng.integers(0, 17, (40, 8, 8), dtype=np.uint8))
    config = config_of(4)
    config.data.update(dataset="array", path=str(tmp_path / "other.npz"), num_channels=1)
    config.training.max_skipped_steps = 1
    real = checkpointing.Saver.save

    def save(self, step, state):
        assert (workdir / "config.json").read_bytes() == before
        real(self, step, state)
        assert saved.get_config(workdir).data.dataset == "array"  # though the run may end here

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing.Saver, "save", save)
        run_lib.train(config, workdir, override=True)
    recorded = saved.get_config(workdir).data
    assert (recorded.dataset, recorded.num_levels) == ("array", 17) and not recorded.scale
    losses = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in losses if "loss" in row)


def test_a_run_may_start_from_anothers_weights(run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    old = state_of(config_of(), run)
    config = config_of(2, parametrization="noise")
    config.training.update(truncation="fixed", n_iters=2)
    config.optim.update(lr=1e-30, warmup=0)
    state = run_lib.train(config, tmp_path / "new", init_from=str(run))
    assert f"weights of step 2 of {run}: " in caplog.text
    assert "new:" not in caplog.text
    assert_identical(state.params, old.ema_params)
    assert_identical(state.ema_params, old.ema_params)
    assert int(state.step) == 2 and int(state.opt_state[2].count) == 2
    # The same command again resumes.
    caplog.clear()
    config.training.n_iters = 4
    assert int(run_lib.train(config, tmp_path / "new", init_from=str(run)).step) == 4
    assert "resumed at step 2 of 4" in caplog.text and "weights of step" not in caplog.text


def labelled_arrays(path, labels, size=8):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 17, (60, size, size), dtype=np.uint8)
    np.savez(path, images=images, labels=np.resize(labels, 60))
    config = config_of(2, num_classes=-1)
    config.data.update(dataset="array", path=str(path), num_channels=1)
    config.optim.update(lr=1e-30, warmup=0)
    return config


def test_rows_of_the_labels_that_another_run_knows_are_taken(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = run_lib.train(labelled_arrays(tmp_path / "a.npz", [2, 5, 7]), tmp_path / "a")
    assert tuple(saved.get_config(tmp_path / "a").data.classes) == ("2", "5", "7")
    config = labelled_arrays(tmp_path / "b.npz", [1, 5], size=12)
    config.seed = 1
    second = run_lib.train(config, tmp_path / "b", init_from=str(tmp_path / "a"))
    assert "2 of 3 rows of the labels" in caplog.text
    theirs, ours = (s.ema_params["Embed_0"]["embedding"] for s in (first, second))
    np.testing.assert_array_equal(ours[1], theirs[1])  # "5"
    np.testing.assert_array_equal(ours[2], theirs[3])  # no label
    assert not np.array_equal(ours[0], theirs[0])
    conv = [s.ema_params["Conv_0"]["kernel"] for s in (first, second)]
    np.testing.assert_array_equal(*conv)


def test_starting_from_what_is_no_model_or_of_another_network_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"--init_from: .* is no run and no exported model"):
        run_lib.train(config_of(), tmp_path / "new", init_from=str(tmp_path))
    with pytest.raises(UserError, match=r"[0-3]\.\d% of the parameters here have the name and"):
        run_lib.train(config_of(nf=12), tmp_path / "new", init_from=str(run))
    assert not (tmp_path / "new" / "config.json").exists()
    run_lib.train(labelled_arrays(tmp_path / "a.npz", [0, 1]), tmp_path / "a")
    other = labelled_arrays(tmp_path / "a.npz", [0, 1])
    other.model.nf = 12
    with pytest.raises(UserError, match=r"\d% of the parameters here have the name and"):
        run_lib.train(other, tmp_path / "new", init_from=str(tmp_path / "a"))


def test_a_labelled_run_from_before_its_labels_had_names_goes_on(tmp_path):
    config = labelled_arrays(tmp_path / "a.npz", [2, 5])
    run_lib.train(config, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    fields = json.loads(path.read_text())
    del fields["data"]["classes"]
    path.write_text(json.dumps(fields))
    config.training.n_iters = 4
    assert int(run_lib.train(config, tmp_path / "run").step) == 4
    assert tuple(saved.get_config(tmp_path / "run").data.classes) == ("2", "5")


@pytest.mark.parametrize("change", ["override", "init_from"])
def test_units_come_from_the_new_file_though_the_recipe_is_the_runs(tmp_path, change):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", images=rng.integers(0, 17, (40, 8, 8), dtype=np.uint8))
    np.savez(tmp_path / "b.npz", images=rng.standard_normal((40, 8, 8)).astype(np.float32) * 50)
    config = config_of()
    config.data.update(dataset="array", path=str(tmp_path / "a.npz"), num_channels=1)
    own = build.with_data_facts(config, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(own.to_json_best_effort())
    recipe = saved.get_config(tmp_path / "run")
    recipe.data.path = str(tmp_path / "b.npz")
    assert recipe.data.num_levels == 17
    run = tmp_path / "run"
    if change == "override":
        read = build.with_data_facts(recipe, run, override=True)
    else:
        read = build.with_data_facts(recipe, tmp_path / "new", init_from=str(run))
    assert read.data.num_levels == 0 and read.data.scale[1] > 100


def test_labels_of_other_names_are_told(tmp_path):
    images = np.zeros((20, 8, 8, 1), np.uint8)
    for known, has, line in (
        (("a", "b"), ("a", "c"), "label 1 is 'c' in x, and 'b' in the run's training data"),
        (("a",), ("a", "c"), "model.num_classes is 1, and x has 2 labels; a new run takes"),
        (("a", "b", "c"), ("a",), "model.num_classes is 3, and x has 1 labels"),
    ):
        config = config_of(num_classes=len(known))
        config.data.classes = known
        data = Dataset("x", ArraySource(images, np.zeros(20, int)), 17, has)
        with pytest.raises(UserError, match=line):
            check_labels(config.model.num_classes, config.data.classes, data)
