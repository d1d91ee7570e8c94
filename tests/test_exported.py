"""Exported models, and samples in files that an interruption cut off."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import build
import run_lib
from configs import saved
from configs.default import get_default_config
from configs.errors import UserError
from configs.saved import as_recorded
from metrics import batched_sampling
from modes import sample as sample_mode
from modes import transfer
from runtime import checkpointing, exported, locking, provenance, workdir
from tests.helpers import sample_run, tiny_config
from tests.jobs import assert_identical

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture(scope="module")
def exported_run(tmp_path_factory, small_network):
    """(config, run, exported model)."""
    folder = tmp_path_factory.mktemp("exported")
    config = tiny_config(n_iters=3)
    config.sampling.update(method="dpm_solver", num_steps=2, n_images=4)
    config.eval.update(cache_dir="/somewhere/here", begin_ckpt=1, end_ckpt=1)
    config.training.snapshot_freq = 3
    run_lib.train(config, folder / "run")
    transfer.export(build.open_run(config, folder / "run"), folder / "run", folder / "model")
    config.eval.update(begin_ckpt=0, end_ckpt=0)
    return config, folder / "run", folder / "model"


def test_an_exported_model_samples_as_its_run_does(exported_run):
    config, run, model = exported_run
    assert {path.name for path in model.iterdir()} == {exported.WEIGHTS, "config.json", "README.md"}
    shape = build.set_up(config).state_shape
    state = checkpointing.restore_latest(config, model, shape)
    assert int(state.step) == 3
    assert_identical(state.ema_params, checkpointing.restore_latest(config, run, shape).ema_params)
    own = saved.get_config(model)
    assert own.eval.cache_dir == "" and own.training == config.training
    assert "/somewhere" not in (model / "config.json").read_text()
    samples = []
    for folder, of_folder in ((run, config), (model, own)):
        sample_run(of_folder, folder)
        samples.append(np.load(folder / "samples" / "samples.npz")["samples"])
    np.testing.assert_array_equal(*samples)
    card = (model / "README.md").read_text()
    assert "3 steps of 8 images" in card and "225 parameters" in card
    assert "soft truncation, k = 1" in card and "have not been evaluated" in card


def test_png_files_go_on_where_they_were_cut_off_and_are_the_samples(exported_run, monkeypatch):
    config, _, model = exported_run
    config = config.copy_and_resolve_references()
    config.eval.cache_dir = ""
    config.sampling.update(n_images=10, batch_size=4, format="npy")
    sample_run(config, model)
    expected = np.load(model / "samples" / "samples.npy")
    config.sampling.format = "png"
    drawn, folder = [], model / "samples" / "png"

    def cut_after(count):
        def get(*args):
            sampler = batched_sampling.get_sampler(*args)

            def draw(params, key, start):
                if len(drawn) == count:
                    raise KeyboardInterrupt
                drawn.append(start)
                return sampler(params, key, start)

            return draw

        monkeypatch.setattr(sample_mode, "get_sampler", get)

    cut_after(2)
    with pytest.raises(KeyboardInterrupt):
        sample_run(config, model)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert "00000000.png" in kept and len(kept) <= 8
    (folder / "00000005.png").unlink(missing_ok=True)
    (folder / ".00000009.png.part").write_bytes(b"cut off")
    drawn.clear()
    cut_after(9)
    sample_run(config, model)
    assert drawn == [4, 8]  # the batches that were not whole
    assert {path.name for path in folder.iterdir()} == {
        "source.json",
        *(f"{i:08}.png" for i in range(10)),
    }
    assert kept["00000003.png"] == (folder / "00000003.png").stat().st_mtime_ns
    images = [np.asarray(Image.open(folder / f"{i:08}.png")) for i in range(10)]
    np.testing.assert_array_equal(np.stack(images)[..., None], expected)
    config.seed += 1
    with pytest.raises(UserError, match=r"png has images of other weights, another seed"):
        sample_run(config, model)
    with (
        locking.locked(model / "samples"),
        pytest.raises(UserError, match=r"is at work in .*samples; wait for it"),
    ):
        sample_run(config, model)
    shutil.rmtree(model / "samples")
    config.sampling.update(method="pc", n_images=2)
    config.model.num_scales = 2
    sample_run(config, model)
    config.model.num_scales = 3
    with pytest.raises(UserError, match=r"png has images of other weights, another seed"):
        sample_run(config, model)
    shutil.rmtree(model / "samples")


def test_an_exported_model_is_not_trained_in_or_written_over(exported_run):
    config, run, model = exported_run
    before = (model / exported.WEIGHTS).read_bytes()
    with pytest.raises(UserError, match="is an exported model, without the state of training"):
        run_lib.train(config, model)
    with pytest.raises(UserError, match=r"--to: .* is there already"):
        transfer.export(build.open_run(config, run), run, model)
    assert (model / exported.WEIGHTS).read_bytes() == before


def test_a_models_card_has_the_report_of_its_own_weights(exported_run, tmp_path):
    config, run, model = exported_run
    params = checkpointing.restore_latest(config, model, build.set_up(config).state_shape).params
    shutil.copytree(run, tmp_path / "run")
    report = {"fd_classifier": 0.125, "classifier_accuracy": 0.5, "classifier_weights": "a"}
    report |= {"num_reference_classifier": 9, "num_test_images_for_scale": 3}
    (tmp_path / "run" / "eval").mkdir()
    of_others, of_these = (
        json.dumps(report | {"weights_digest": digest})
        for digest in ("another", workdir.short_hash(params))
    )
    for name, text in (
        ("of_others", of_others),
        ("damaged", of_these[:-9]),
        ("no_object", f"[{of_these}]"),
        ("no_number", of_these.replace("0.125", '["x"]')),
        ("of_these", of_these),
    ):
        (tmp_path / "run" / "eval" / "report.json").write_text(text)
        transfer.export(build.open_run(config, tmp_path / "run"), tmp_path / "run", tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        assert ("0.1250" in card) == (name == "of_these")


def test_a_card_of_a_later_step_than_the_report_tells_both(exported_run, tmp_path):
    config, run, _ = exported_run
    shutil.copytree(run, tmp_path / "run")
    for step, score in ((1, 0.5), (2, 0.25)):
        folder = tmp_path / "run" / "eval" / f"step_{step:08}"
        folder.mkdir(parents=True)
        report = {"step": step, "weights_digest": str(step), "share_at_ends": score}
        (folder / "report.json").write_text(json.dumps(report))
        (folder / "samples.png").write_text(f"of step {step}")
    for name in ("without", "with"):
        transfer.export(build.open_run(config, tmp_path / "run"), tmp_path / "run", tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        assert "**Of step 2; the weights are of step 3.**" in card
        assert "| 0.2500 |" in card and "0.5000" not in card
        assert ("![Samples](samples.png)" in card) == (name == "with")
        pictures = [path.read_text() for path in (tmp_path / name).glob("*.png")]
        assert pictures == (["of step 3"] if name == "with" else [])
        (tmp_path / "run" / "samples").mkdir(exist_ok=True)
        (tmp_path / "run" / "samples" / "step_00000003.png").write_text("of step 3")


def test_a_card_has_the_licence_of_the_weights_and_the_project(exported_run, tmp_path, monkeypatch):
    config, run, _ = exported_run
    address = "https://example.org/mine"
    monkeypatch.setattr(provenance, "project", lambda: ("1.2.3", address))
    setup = build.open_run(config, run).rebuild({"model.license": "cc0-1.0"})
    card = (transfer.export(setup, run, tmp_path / "model") / "README.md").read_text()
    assert card.startswith("---\nlicense: cc0-1.0\n")
    assert "| licence of the weights | cc0-1.0 |" in card
    assert f"made with [Soft truncation]({address}), version 1.2.3" in card
    assert saved.get_config(tmp_path / "model").model.license == "cc0-1.0"
    with pytest.raises(UserError, match=r"model\.license is 'mit\\nx'; a name is like mit"):
        build.open_run(config, run).rebuild({"model.license": "mit\nx"})


def test_a_folders_name_is_all_that_is_left_of_its_path(tmp_path):
    config = get_default_config()
    config.sampling.mask = "/mine/mask.png"
    for dataset, name in (("folder", "pictures"), ("CIFAR10", "")):
        config.data.update(dataset=dataset, path="/mine/pictures/")
        own = workdir.portable_config(as_recorded(config), tmp_path)
        assert own.data.path == name and "/mine" not in own.to_json_best_effort()


def test_weights_that_do_not_belong_to_the_config_are_one_line(exported_run, tmp_path):
    config, _, model = exported_run
    path = tmp_path / exported.WEIGHTS
    other = config.copy_and_resolve_references()
    other.model.nf = 16
    shutil.copy(model / exported.WEIGHTS, path)
    with pytest.raises(UserError, match=r"of another network: Conv_0/bias is \[8\] there, and"):
        checkpointing.restore_latest(other, tmp_path, build.set_up(other).state_shape)
    shape = build.set_up(config).state_shape
    for damaged in (path.read_bytes()[:-100], (10**12).to_bytes(8, "little") + b"{}", b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="can't be read"):
            checkpointing.restore_latest(config, tmp_path, shape)


def test_an_exported_array_in_another_order_of_memory_is_the_same(tmp_path):
    # As transposed kernels of the release are.
    params = {"Conv_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T}}
    exported.write(tmp_path, params, 5)
    assert_identical(exported.read(tmp_path, params), params)


def test_a_hash_is_of_names_and_values():
    x, y = np.zeros(2), np.ones(2)
    trees = ({"a": x}, {"b": x}, {"a": y}, {"a": x, "b": x}, {"a": [x, x]})
    assert len({workdir.short_hash(tree) for tree in trees}) == len(trees)
    assert workdir.short_hash(trees[0]) == workdir.short_hash({"a": x.copy()})
