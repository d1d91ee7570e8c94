"""Evaluations as a user starts them; with a sampler of a few steps and a tiny network."""

import csv
import json
import shutil
import subprocess
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

import build
import datasets
import evaluation
import run_lib
from configs import saved
from configs.errors import UserError
from data import pixels
from data.batches import subset
from metrics import bits_per_dim, given_images, scorers
from metrics import report as metrics_report
from metrics.features import Extractor
from modes import compare, sample
from tests.helpers import GOLDEN, tiny_config
from tests.jobs import kill, run_main, start, wait_until

pytestmark = pytest.mark.usefixtures("small_network", "short_classifier")


def eval_config(tmp_path, **fields):
    config = tiny_config(n_iters=6, snapshot_freq=2, snapshot_freq_for_preemption=2)
    config.sampling.update(method="dpm_solver", num_steps=3)
    config.eval.update(
        batch_size=8, num_samples=20, num_test_data=12, nelbo_draws=2, rtol=1e-2, atol=1e-2
    )
    config.eval.update(cache_dir=str(tmp_path / "cache"), **fields)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_network):
    """A workdir with checkpoints at steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    run_lib.train(eval_config(folder), folder / "run")
    return folder


def stand_in_for_inception(monkeypatch, dims):
    """Instead of Inception, whose real weights are not here: features of the pixels."""
    projection = np.random.default_rng(0).standard_normal((64, dims)).astype(np.float32)

    def fn(levels):
        rows = np.tanh(levels.reshape(len(levels), -1).astype(np.float32) / 16 @ projection)
        return {"features": rows, "logits": rows[:, :100]}

    extractor = Extractor("inception", "abc", fn, 7)
    monkeypatch.setattr(evaluation, "get_inception", lambda *_: extractor)
    monkeypatch.setattr(scorers, "get_inception", lambda *_: extractor)
    return extractor


@pytest.fixture
def inception(monkeypatch):
    return stand_in_for_inception(monkeypatch, 256)  # whose distances are sooner computed


def test_features_of_the_data_are_computed_once(tmp_path, monkeypatch):
    config, computed = eval_config(tmp_path), []

    def fn(levels):
        computed.append(len(levels))
        return {"features": levels.reshape(len(levels), -1).astype(np.float32)}

    extractor = Extractor("classifier", "abc", fn, 500)
    monkeypatch.setattr(scorers, "get_classifier", lambda *_: (extractor, 0.5))
    setup, data = build.set_up(config), datasets.load_data(config)
    (first,) = scorers.get_scorers(setup, data)
    assert sum(computed) == len(data.train) + len(data.test)
    (again,) = scorers.get_scorers(setup, data)
    assert sum(computed) == len(data.train) + len(data.test)
    assert first.facts == again.facts
    np.testing.assert_array_equal(first.reference.mean, again.reference.mean)


class Cut(Exception):
    """The machine is taken away."""


def cut_after(monkeypatch, owner, name, calls):
    """The function that `owner.name` makes raises at its call number `calls`."""
    make, left = getattr(owner, name), [calls]

    def make_cut(*args, **kwargs):
        fn = make(*args, **kwargs)

        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Cut
            return fn(*args, **kwargs)

        return counted

    monkeypatch.setattr(owner, name, make_cut)


@pytest.mark.slow
def test_an_evaluation_goes_on_where_it_was_cut_off(trained, inception, monkeypatch):
    config = eval_config(trained, enable_fid=True, num_draws=2)
    whole = evaluation.evaluate(config, trained / "run")
    assert whole["num_draws"] == 2 and whole["nll_stderr_of_draws"] > 0
    parts = trained / "run" / "eval" / "parts"
    assert not parts.exists()
    # In the middle of the NLL, then of the sampling, each after two more batches.
    for owner, name in ((evaluation, "get_bpd_fn"), (evaluation, "get_sampler")):
        with monkeypatch.context() as patch:
            cut_after(patch, owner, name, 3 if name == "get_bpd_fn" else 2)
            with pytest.raises(Cut):
                evaluation.evaluate(config, trained / "run")
        assert list(parts.rglob("bpd_*"))
    # What other options computed is not taken: it has another folder.
    folders = set(parts.iterdir())
    other = eval_config(trained, enable_sampling=False, nelbo_draws=1)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_after(patch, evaluation, "get_bpd_fn", 1)
        evaluation.evaluate(other, trained / "run")
    assert len(set(parts.iterdir()) - folders) == 1
    assert len(list(parts.rglob("samples_*"))) == 2
    # One part is damaged, as by a power cut.
    damaged = next(parts.rglob("samples_00000008.npz"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    with monkeypatch.context() as patch:
        cut_after(patch, evaluation, "get_bpd_fn", 0)  # all of that is there
        cut_after(patch, evaluation, "get_sampler", 2)  # the damaged one, and the third
        assert evaluation.evaluate(config, trained / "run") == whole
    # What is left is the other evaluation's, which can still go on.
    assert len(list(parts.iterdir())) == 1
    shutil.rmtree(parts)


@pytest.mark.slow
def test_a_sweep_has_a_row_a_checkpoint_and_the_best_by_each_score(trained):
    config = eval_config(trained, enable_fid=False, begin_ckpt=1, end_ckpt=2)
    sweep = evaluation.evaluate(config, trained / "run")
    folder = trained / "run" / "eval"
    assert sweep == json.loads((folder / "report.json").read_text())
    reports = sweep["checkpoints"]
    assert [report["step"] for report in reports] == [2, 4]
    for name, pick in (("nll", min), ("fd_classifier", min), ("recall_classifier", max)):
        assert sweep["best"][name] == pick(reports, key=lambda report: report[name])["step"]
    assert reports[0]["nll_untrained_network"] == reports[1]["nll_untrained_network"]
    text = (folder / "report.md").read_text()
    for report in reports:
        own = folder / f"step_{report['step']:08}"
        assert json.loads((own / "report.json").read_text()) == report
        assert (own / "samples.png").exists() and own.name in text
    assert Image.open(folder / "scores.png").size[0] > 500
    # Alone, a checkpoint has the same scores.
    config.eval.update(begin_ckpt=2)
    assert evaluation.evaluate(config, trained / "run") == reports[1]
    config.eval.update(begin_ckpt=7, end_ckpt=9)
    with pytest.raises(UserError, match=r"no checkpoint from step 14 to 18.*it has 2, 4, 6"):
        evaluation.evaluate(config, trained / "run")


@pytest.mark.slow
def test_a_later_evaluation_keeps_what_it_leaves_out(trained):
    config = eval_config(trained, enable_fid=False, begin_ckpt=3, end_ckpt=3)
    folder = trained / "run" / "eval"

    def evaluate(**fields):
        config.eval.update(enable_bpd=True, enable_sampling=True)
        config.eval.update(fields)
        return evaluation.evaluate(config, trained / "run")

    whole = evaluate()
    (folder / "report.json").unlink()
    assert "nll" not in evaluate(enable_bpd=False)
    assert evaluate(enable_sampling=False) == whole
    assert evaluate(enable_bpd=False) == whole == json.loads((folder / "report.json").read_text())
    assert (folder / "samples.png").exists()
    # The scores and samples of other weights are not kept.
    report = evaluate(enable_sampling=False, begin_ckpt=2, end_ckpt=2)
    assert "nll" in report and "fd_classifier" not in report
    assert not (folder / "samples.png").exists()


@pytest.mark.slow
def test_a_checkpoint_that_training_deletes_in_the_meantime_is_not_asked_for(
    trained, tmp_path, monkeypatch
):
    config = eval_config(trained, enable_sampling=False)
    shutil.copytree(trained / "run" / "checkpoints", tmp_path / "checkpoints")

    def goes_on(_):  # a training, while the baselines are scored
        shutil.rmtree(tmp_path / "checkpoints" / "6")
        return {}

    monkeypatch.setattr(evaluation, "evaluate_baselines", goes_on)
    assert evaluation.evaluate(config, tmp_path)["step"] == 4


def test_samples_by_anyone_are_scored(tmp_path, inception):
    config = eval_config(tmp_path, enable_fid=True, num_reference=200)
    train = datasets.get_dataset(config, "train")
    chosen = subset(train, 200)
    others = train.source.fetch(np.setdiff1d(np.arange(len(train)), chosen)[:200])["image"]
    images = pixels.levels_to_uint8(others, 17)
    np.savez(tmp_path / "real.npz", samples=images)
    np.savez(tmp_path / "noise.npz", arr_0=np.random.default_rng(0).permuted(images, axis=1))
    folder = tmp_path / "pngs"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(folder / f"{i:03}.png")
    reports = {}
    for name in ("real.npz", "noise.npz", "pngs"):
        config.eval.samples = str(tmp_path / name)
        reports[name] = evaluation.evaluate(config, tmp_path / "run")
        (own,) = (tmp_path / "run" / "eval").glob(f"samples_{name}_*")
        assert json.loads((own / "report.json").read_text()) == reports[name]
        assert "200 of" in (own / "report.md").read_text()
    for score in ("fid", "kid", "fd_classifier"):
        np.testing.assert_allclose(reports["real.npz"][score], reports["pngs"][score])
        assert reports["real.npz"][score] < 0.5 * reports["noise.npz"][score]
    assert abs(reports["real.npz"]["kid"]) < 5 * reports["real.npz"]["kid_stderr"]
    assert reports["real.npz"]["precision"] > 0.5 > reports["noise.npz"]["precision"]
    assert "not comparable" in (own / "report.md").read_text()
    # Scored by hand, the FID is the same.
    reference = inception.fn(train.source.fetch(chosen)["image"])["features"]
    by_hand = evaluation.frechet_distance(reference, inception.fn(others)["features"])
    np.testing.assert_allclose(reports["pngs"]["fid"], by_hand, rtol=1e-6)


@pytest.mark.slow
def test_bits_of_given_images_are_a_row_each_in_a_folder_of_their_own(trained, tmp_path, caplog):
    rng = np.random.default_rng(0)
    (tmp_path / "few").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / f"few/{i}.png")
    np.savez(tmp_path / "many.npz", samples=rng.integers(0, 256, (7, 8, 8, 1), np.uint8))
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        archive.write(tmp_path / "few" / "0.png", "inside/0.png")
    no_reports = shutil.ignore_patterns("eval")
    shutil.copytree(trained / "run", tmp_path / "run", ignore=no_reports)
    rows = {}
    for images, count in (("few", 3), ("many.npz", 7), ("zipped.zip", 1), ("test", 12)):
        path = images if images == "test" else str(tmp_path / images)
        config = eval_config(trained, images=path, image_draws=2, truncated_normal=True)
        config.eval.update(nll_steps=32, nelbo_draws=1)
        before = set((tmp_path / "run" / "eval").glob("images_*"))
        report = evaluation.evaluate(config, tmp_path / "run")
        (folder,) = set((tmp_path / "run" / "eval").glob("images_*")) - before
        with (folder / "bits_per_dim.csv").open() as file:
            rows[images] = list(csv.DictReader(file))
        assert len(rows[images]) == report["num_test_images"] == count
        told = "12 test images" if images == "test" else f"{count} images of {path}"
        assert told in (folder / "report.md").read_text()
        mean = np.mean([float(row["nll"]) for row in rows[images]])
        np.testing.assert_allclose(mean, report["nll"], rtol=1e-5)
        assert float(rows[images][0]["nll_stderr"]) > 0 and report["truncated_normal_r"] > 3
        weighted = np.mean([float(row["nll_truncated_normal_weighted"]) for row in rows[images]])
        np.testing.assert_allclose(weighted, report["nll_truncated_normal_weighted"], rtol=1e-5)
        assert weighted <= report["nll_truncated_normal"]
    assert [row["image"] for row in rows["few"]] == ["0.png", "1.png", "2.png"]
    # The same image has the same bits in any company.
    assert rows["zipped.zip"][0]["image"] == "inside/0.png"
    assert rows["zipped.zip"][0]["nll"] == rows["few"][0]["nll"]
    assert not (tmp_path / "run" / "eval" / "report.json").exists()
    config = eval_config(trained, images=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"eval\.images: there is no file or folder"):
        evaluation.evaluate(config, tmp_path / "run")


@pytest.mark.release
@pytest.mark.slow
def test_statistics_are_made_once_and_refused_for_other_data(tmp_path, monkeypatch):
    stand_in_for_inception(monkeypatch, 2048)
    path = tmp_path / "stats" / "digits.npz"
    config = eval_config(tmp_path, enable_fid=True, num_reference=100, stats_path=str(path))
    np.savez(tmp_path / "x.npz", np.zeros((9, 8, 8, 1), np.uint8))
    config.eval.samples = str(tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"there is no file .*--mode stats makes it"):
        evaluation.evaluate(config, tmp_path / "run")
    assert evaluation.make_statistics(build.set_up(config)) == path
    assert list(path.parent.iterdir()) == [path]
    assert evaluation.evaluate(config, tmp_path / "run")["statistics"] == str(path)
    config.eval.num_reference = 101
    with pytest.raises(UserError, match="num_images 100, and here it is 101"):
        evaluation.evaluate(config, tmp_path / "run")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="can't be read as statistics"):
        evaluation.evaluate(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "array", "line"),
    [
        ("none.npz", None, "there is no file or folder"),
        ("small.npz", np.zeros((9, 4, 4, 1), np.uint8), r"shape \(9, 4, 4, 1\)"),
        ("float.npz", np.zeros((9, 8, 8, 1)), "float64"),
        ("few.npz", np.zeros((3, 8, 8, 1), np.uint8), "N ≥ 4"),
        ("objects.npz", np.array([None] * 5), "can't be read"),
    ],
)
def test_samples_that_can_not_be_scored_are_one_line(tmp_path, name, array, line):
    if array is not None:
        np.savez(tmp_path / name, samples=array)
    config = eval_config(tmp_path, samples=str(tmp_path / name))
    with pytest.raises(UserError, match=line):
        evaluation.evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_other_images_is_one_line(tmp_path):
    folder = tmp_path / "pngs"
    folder.mkdir()
    config = eval_config(tmp_path, samples=str(folder))
    with pytest.raises(UserError, match="has no images"):
        evaluation.evaluate(config, tmp_path / "run")
    for i in range(5):
        Image.new("L", (8, 9)).save(folder / f"{i}.png")
    with pytest.raises(UserError, match=r"0\.png is not a readable image: it is 8×9"):
        evaluation.evaluate(config, tmp_path / "run")


@pytest.mark.release  # test_an_evaluation_goes_on_where_it_was_cut_off is its quick form
def test_a_killed_evaluation_ends_with_the_same_report(tmp_path):
    shutil.copytree(GOLDEN / "workdir", tmp_path / "run")
    args = [
        f"--workdir={tmp_path}/run",
        f"--config.eval.cache_dir={tmp_path}/cache",
        "--config.eval.batch_size=5",
        "--config.eval.num_test_data=30",
        "--config.eval.nelbo_draws=2",
        "--config.eval.rtol=1e-2",
        "--config.eval.atol=1e-2",
        "--config.eval.num_samples=400",
        "--config.sampling.method=dpm_solver",
    ]
    recipe = f"saved.py:{tmp_path}/run"
    eval_folder = tmp_path / "run" / "eval"
    for kind, count in (("bpd", 3), ("samples", 30)):
        process = start(recipe, *args, "--mode=eval", stderr=subprocess.DEVNULL)
        parts = f"{kind}_*.npz"
        wait_until(lambda p=parts, n=count: len(list(eval_folder.rglob(p))) >= n, process)
        kill(process)
    assert not (eval_folder / "report.json").exists()
    reports = []
    for _ in range(2):  # gone on with, and from the beginning
        result = run_main(recipe, *args, "--mode=eval")
        assert result.returncode == 0, result.stderr
        reports.append((eval_folder / "report.json").read_bytes())
    assert reports[0] == reports[1]


LESS_IS_BETTER = ("nll", "nelbo", "fid", "kid", "fd_classifier", "kid_classifier")
MORE_IS_BETTER = ("inception_score", "label_agreement", "precision", "recall")
MORE_IS_BETTER += ("precision_classifier", "recall_classifier")


def test_the_best_of_a_sweep_is_the_least_distance_and_the_most_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_report, "remarks", lambda _: [])
    monkeypatch.setattr(metrics_report, "_plot_sweep", lambda *_: None)
    names = (*LESS_IS_BETTER, *MORE_IS_BETTER)
    reports = [{"data": "digits", "step": i} | dict.fromkeys(names, i / 10) for i in (1, 2, 3)]
    best = metrics_report.write_sweep(reports, tmp_path)["best"]
    assert best == dict.fromkeys(LESS_IS_BETTER, 1) | dict.fromkeys(MORE_IS_BETTER, 3)


@pytest.mark.parametrize(("gaussian", "verb"), [(4.5, "beats"), (3.5, "does NOT beat")])
def test_a_gain_over_a_baseline_is_fewer_bits(gaussian, verb):
    own = {"nll": 4.0, "nll_gaussian": gaussian, "num_test_images": 9, "num_draws": 1}
    own |= {"rtol": 1e-5, "atol": 1e-5, "nll_steps": 32, "nll_nfe": 33.0, "nelbo_draws": 1}
    first = next(metrics_report.remarks(own | {"num_levels": 256}))
    assert first.startswith(f"Training {verb} a Gaussian by 0.500 bits/dim")


@pytest.mark.usefixtures("small_network_here")
def test_two_experts_are_either_run_at_the_ends_of_time(tmp_path):
    config, scores, samples = tiny_config(), {}, {}
    config.eval.update(enable_sampling=False, num_test_data=4, batch_size=4, nll_steps=32)
    config.sampling.update(method="dpm_solver", num_steps=4, n_images=4, batch_size=4)
    runs = {"a": tmp_path / "a", "b": tmp_path / "b"}
    for steps, run in zip((2, 6), runs.values(), strict=True):
        config.training.n_iters = steps
        run_lib.train(config, run)
    at = {"a": "", "b": "", "at ε": f"{runs['b']}@1e-5", "at T": f"{runs['b']}@1"}
    at["between"] = f"{runs['b']}@0.5"
    for name, expert in at.items():
        run = runs.get(name, runs["a"])
        report = evaluation.evaluate(config, run, expert)
        scores[name] = report["nll"], report["nelbo"]
        assert report.get("expert", "") == expert
        sample.sample(build.open_run(config, run, expert), run)
        samples[name] = np.load(run / "samples" / "samples.npz")["samples"].astype(int)
    for ours, whose in (("at ε", "b"), ("at T", "a")):
        assert scores[ours] == pytest.approx(scores[whose], abs=1e-6)
        np.testing.assert_array_equal(samples[ours], samples[whose])
    nelbos = [scores[name][1] for name in ("a", "between", "b")]
    assert nelbos[0] > nelbos[1] > nelbos[2]  # b has learned for longer, at all times
    for wrong, told in (("b", "must be RUN@t"), (f"{runs['b']}@x", "must be RUN@t")):
        with pytest.raises(UserError, match=told):
            build.open_run(config, runs["a"], wrong)
    config.training.sde = "subvpsde"
    with pytest.raises(UserError, match="has another sde"):
        build.open_run(config, runs["a"], at["between"])


def test_runs_are_compared_by_fields_scores_and_curves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run, k in (("a", 1.0), ("b", 2.0), ("c", 1.0)):
        config = tiny_config()
        config.training.k = k
        report = {"data": "digits", "step": 6, "nll": 3.0 + k, "nll_stderr": 0.25}
        report |= {"num_test_images": 9, "num_draws": 1, "rtol": 1e-5, "atol": 1e-5}
        report |= {"nll_steps": 32, "nll_nfe": 33.0, "nelbo_draws": 1, "num_levels": 17}
        (tmp_path / run / "eval").mkdir(parents=True)
        (tmp_path / run / "config.json").write_text(json.dumps(saved.as_recorded(config)))
        (tmp_path / run / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
        if run != "c":
            (tmp_path / run / "eval" / "report.json").write_text(json.dumps(report))
    text = compare.compare(["a", "b", "c"], tmp_path / "out")
    assert "| `training.k` | 1.0 | 2.0 | 1.0 |" in text and text.count("| `training") == 1
    assert "| step | 6 | 6 | not evaluated |" in text
    assert "| `nll` | 4.0000 ± 0.2500 | 5.0000 ± 0.2500 |  |" in text
    assert text == (tmp_path / "out" / "compare.md").read_text()
    assert Image.open(tmp_path / "out" / "curves.png").width > 500
    for runs, line in ((["a"], "needs two runs"), (["a", "typo"], "typo has no run")):
        with pytest.raises(UserError, match=line):
            compare.compare(runs, tmp_path / "out")


@pytest.mark.parametrize("field", ["data", "num_levels", "padded", "step", "weights_digest"])
def test_scores_of_an_earlier_report_are_kept_for_the_same_weights_alone(field, tmp_path):
    same = {"data": "digits", "num_levels": 17, "step": 6, "weights_digest": "a"}
    (tmp_path / "report.json").write_text(json.dumps(same | {"nelbo": 4.0, "recall": 0.5}))
    assert metrics_report.earlier_scores(same | {"num_samples": 5}, tmp_path) == {"nelbo": 4.0}
    assert (
        metrics_report.earlier_scores(same | {"num_samples": 5, field: "another"}, tmp_path) == {}
    )


def test_the_table_of_images_has_the_error_of_the_mean_over_draws():
    config = tiny_config()
    config.eval.num_draws = 4
    nll = np.random.default_rng(0).standard_normal((4, 3))
    evaluated = bits_per_dim.BitsEvaluation(build.set_up(config), None, None, None)
    table = bits_per_dim.table_of_images(evaluated, {"nll": nll, "nfe": nll})
    assert set(table) == {"nll", "nll_stderr"}
    np.testing.assert_allclose(table["nll"], nll.mean(axis=0))
    np.testing.assert_allclose(table["nll_stderr"], nll.std(axis=0, ddof=1) / 2)


def test_noise_of_bits_is_a_function_of_the_image_and_the_seed():
    images = np.random.default_rng(0).integers(0, 17, (5, 8, 8, 1), np.uint8)
    images[3] = images[0]
    data = jax.random.key_data(bits_per_dim.keys_of_contents(1, images))
    again = jax.random.key_data(bits_per_dim.keys_of_contents(1, images[::-1]))
    np.testing.assert_array_equal(data, again[::-1])
    assert len(np.unique(data, axis=0)) == 4
    other = jax.random.key_data(bits_per_dim.keys_of_contents(2, images))
    assert not (data == other).all(axis=1).any()


@pytest.mark.slow
def test_bits_of_an_image_do_not_depend_on_the_others(trained, tmp_path):
    rng, scores = np.random.default_rng(0), []
    images = [Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)) for _ in range(9)]
    shutil.copytree(trained / "run", tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    folders = {"plain": range(6), "turned": range(5, -1, -1), "more": [8, 0, 7, 1, 2, 3, 4, 5, 6]}
    for (name, order), size in zip(folders.items(), (4, 4, 9), strict=True):
        (tmp_path / name).mkdir()
        for place, i in enumerate(order):
            images[i].save(tmp_path / name / f"{place}_{i}.png")
        config = eval_config(trained, images=str(tmp_path / name), rtol=1e-4, atol=1e-4)
        config.eval.update(batch_size=size, image_draws=2)
        evaluation.evaluate(config, tmp_path / "run")
        (path,) = (tmp_path / "run" / "eval").glob(f"images_{name}_*/bits_per_dim.csv")
        with path.open() as file:
            rows = {row.pop("image").split("_")[1]: row for row in csv.DictReader(file)}
        assert all(float(row["nll_stderr"]) > 0 for row in rows.values())
        scores.append([[float(v) for v in rows[f"{i}.png"].values()] for i in range(6)])
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_allclose(scores[0], scores[2], atol=1e-4)


def test_labels_of_given_images_are_those_of_the_networks_classes(tmp_path, caplog):
    config = tiny_config()
    config.model.num_classes = 3
    config.eval.images = str(tmp_path)
    for i, label in enumerate(["cat", "dog", "cat"]):
        (tmp_path / label).mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / label / f"{i}.png")

    def labels(classes):
        config.data.classes = classes
        chosen, _ = given_images.given_images(build.set_up(config), None)
        return chosen.source.fetch(np.arange(3))["label"].tolist() if chosen.classes else None

    assert labels(("ant", "cat", "dog")) == [1, 1, 2]
    assert not caplog.text
    assert labels(("0", "1", "2")) is None
    assert (
        "taken as images of no label: cat is none of the network's classes 0, 1, 2" in caplog.text
    )


def test_labels_of_given_arrays_are_those_of_the_networks_classes(tmp_path):
    config = tiny_config()
    config.data.update(dataset="array", num_levels=17)
    config.model.num_classes = 2
    config.eval.images = str(tmp_path / "own.npz")
    images = np.random.default_rng(0).integers(0, 17, (3, 8, 8), np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=[7, 2, 7])
    config.data.classes = ("2", "7")
    chosen, names = given_images.given_images(build.set_up(config), None)
    assert chosen.source.fetch(np.arange(3))["label"].tolist() == [1, 0, 1]
    assert chosen.num_levels == 17 and list(names) == ["0", "1", "2"]
