import concurrent.futures
import json
import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

import evaluation
import run_lib
from build import REGISTRIES
from configs.errors import UserError
from configs.validate import validate
from experiments import figures, make_data, tables
from experiments import run as runner
from experiments.rows import add_row, read_rows, read_sweep
from experiments.sweep import load_sweep, parse_machine_paths, select
from experiments.sweeps import digits, photographs_16
from metrics.report import write_bits
from runtime import environment

ROOT = pathlib.Path(__file__).parent.parent
SWEEP_FILES = sorted(
    p for p in ROOT.glob("experiments/sweeps/*.py") if p.stem not in ("__init__", "claim")
)
SWEEP = """
from experiments.sweep import Sweep
from tests.helpers import tiny_config

def get_sweep():
    config = tiny_config(n_iters=4)
    config.sampling.update(method="dpm_solver", num_steps=3)
    # Other tests have bits/dim, which take long to compile.
    config.eval.update(enable_bpd=False, batch_size=20, num_samples=20, num_reference=100)
    points = {  # they share the programs, which take most of the time
        "vp_fixed_1e-5": {"training.n_iters": 3},
        "vp_soft_k1": {"training.k": 1.0},
    }
    return Sweep("tiny", config, points, seeds=(0,))
"""
RUNS = ["vp_fixed_1e-5_seed0", "vp_soft_k1_seed0"]


@pytest.fixture(autouse=True)
def own_log(monkeypatch):
    monkeypatch.setattr(environment, "prepare", lambda: None)


@pytest.fixture
def stand_ins(monkeypatch):
    """Training and evaluation that give a function of the config, as the real ones do."""

    def train(config, workdir):
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        (workdir / "metrics.jsonl").write_text('{"step": 1, "test_loss": 0.5}\n')
        return SimpleNamespace(step=config.training.n_iters)

    def evaluate(config, workdir):
        step = config.training.n_iters
        return {"step": step, "nll": 1 / step, "nll_stderr": 0.1}

    monkeypatch.setattr(run_lib, "train", train)
    monkeypatch.setattr(evaluation, "evaluate", evaluate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has a sweep, and what it leaves."""
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "tiny.py").write_text(SWEEP)
    return folder


def sweep_main(folder, name, *options):
    """The exit status of the runner, which leaves rows in <name>.jsonl, workdirs in <name>_runs."""
    paths = [str(folder / "tiny.py"), "--out", str(folder / f"{name}.jsonl")]
    paths += ["--workdirs", str(folder / f"{name}_runs")]
    return runner.main([*paths, f"--set=eval.cache_dir={folder / 'cache'}", *options])


def rows_of(folder, name):
    """Rows by run, without what differs from time to time."""
    rows = {f"{row['point']}_seed{row['seed']}": row for row in read_rows(folder / f"{name}.jsonl")}
    for row in rows.values():
        for field in ("images_per_second", "train_seconds", "eval_seconds"):
            row.pop(field)
    return rows


@pytest.mark.slow
def test_a_run_leaves_a_row_with_its_scores(folder):
    assert sweep_main(folder, "trained", "--only=soft") == 0
    ((name, row),) = rows_of(folder, "trained").items()
    assert name == RUNS[1] and row["steps"] == 4 and row["seed"] == 0
    assert row["overrides"] == {"training.k": 1.0} and row["versions"]["jax"] == jax.__version__
    scores = row["scores"]
    assert np.isfinite(scores["fd_classifier"]) and scores["fd_classifier_stderr"] > 0
    assert len(scores["classifier_weights"]) == 64
    workdirs, picture = [str(folder / "trained_runs" / name)] * 2, folder / "samples.png"
    assert figures.main(["samples", str(picture), *workdirs, "--columns=3"]) == 0
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    "real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["stand_ins", "real"]
)
def test_shards_and_a_cut_give_the_same_rows(folder, real, request, monkeypatch, capsys):
    """One shard ends, the other is cut between training and evaluation and goes on."""
    if not real:
        request.getfixturevalue("stand_ins")
    whole, parts = f"whole_{real}", f"parts_{real}"
    assert sweep_main(folder, whole) == 0
    assert sweep_main(folder, parts, "--shard=0/2", "--discard") == 0
    assert not (folder / f"{parts}_runs" / RUNS[0] / "checkpoints").exists()

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", cut)
        assert sweep_main(folder, parts, "--shard=1/2") == 1
    assert "the same command goes on" in capsys.readouterr().err
    assert list(rows_of(folder, parts)) == RUNS[:1]
    assert sweep_main(folder, parts, "--shard=1/2") == 0
    assert (folder / f"{parts}_runs" / RUNS[1] / "checkpoints").exists()
    assert rows_of(folder, parts) == rows_of(folder, whole)
    monkeypatch.setattr(run_lib, "train", cut)  # whatever is done is not done again
    assert sweep_main(folder, parts) == 0


@pytest.mark.parametrize("error", [UserError("the loss is nan"), OSError(28, "No space left")])
def test_a_failed_run_does_not_stop_the_others(
    error, folder, stand_ins, monkeypatch, capsys, caplog
):
    train, (name, other) = run_lib.train, RUNS

    def failing(config, workdir):
        if config.training.n_iters == 3:
            raise error
        return train(config, workdir)

    out = type(error).__name__
    with monkeypatch.context() as patch:
        patch.setattr(run_lib, "train", failing)
        assert sweep_main(folder, out) == 1
    assert capsys.readouterr().err.strip() == f"error: 1 runs failed: {name}"
    assert f"run {name} failed: {error}" in caplog.messages
    assert not any(record.exc_info for record in caplog.records)  # no traceback
    assert list(rows_of(folder, out)) == [other]
    assert sweep_main(folder, out) == 0
    assert sorted(rows_of(folder, out)) == RUNS


def test_a_row_of_another_config_is_refused(folder, stand_ins, monkeypatch, capsys):
    assert sweep_main(folder, "other", "--only=soft") == 0
    path = folder / "other.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config_hash": "0"}))
    monkeypatch.setattr(run_lib, "train", None)
    assert sweep_main(folder, "other") == 2
    error = capsys.readouterr().err.strip()
    assert RUNS[1] in error and "another config" in error and "\n" not in error


def test_scores_of_an_earlier_checkpoint_make_no_row(folder, stand_ins, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda config, workdir: {"step": 1, "nll": 1.0})
    assert sweep_main(folder, "earlier") == 1
    assert not (folder / "earlier.jsonl").exists()


def test_evaluations_of_a_run_have_data_and_names_of_their_own(tmp_path, stand_ins, monkeypatch):
    def evaluate(config, workdir):
        images = pathlib.Path(config.eval.images)
        scores = {"fd_classifier": 2.0} if not images.name else dict.fromkeys(("nll", "nelbo"), 1.0)
        if images.name == "validation":
            assert images.parent == tmp_path
            scores = {"nll": 3.0, "nelbo": 3.0, "num_test_images": 2}
        folder = {"": "features"}.get(images.name, "training")
        assert config.data.path == str(tmp_path / folder)
        if images.name:
            kept = workdir / "eval" / f"images_{images.name}"
            kept.mkdir(parents=True)
            columns = {name: np.full(2, scores[name]) for name in ("nelbo", "nll")}
            write_bits(kept / "bits_per_dim.csv", ["0", "7"], columns)
        return {"step": config.training.n_iters, **scores}

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    runs = photographs_16.get_sweep().runs[:1]
    with pytest.raises(UserError, match=r"photographs_16 needs the folder .* --set data\.path=DIR"):
        runner.run_sweep(runs, tmp_path / "rows.jsonl", tmp_path)
    places = {"data.path": str(tmp_path)}
    assert runner.run_sweep(runs, tmp_path / "rows.jsonl", tmp_path / "runs", places) == []
    (row,) = read_rows(tmp_path / "rows.jsonl")
    expected = {"nll": 1, "nelbo": 1, "validation_nll": 3, "validation_nelbo": 3}
    assert row["scores"] == {**expected, "fd_classifier": 2, "step": 2000}
    assert row["of_images"] == {"nll": [1.0, 1.0], "nelbo": [1.0, 1.0]}
    assert row["test_loss"] == [[1, 0.5]]


@pytest.mark.parametrize("file", SWEEP_FILES, ids=lambda file: file.stem)
def test_the_points_of_a_sweep_are_valid_and_its_rows_are_of_it(file):
    sweep = load_sweep(str(file))
    assert sweep.name == file.stem
    places = {"data.path": "here"} if sweep.config.data.path else {}
    for run in sweep.runs:
        validate(run.config(places), 1, REGISTRIES)
    hashes = {(run.point, run.seed): run.config_hash for run in sweep.runs}
    assert len(set(hashes.values())) == len(hashes)
    rows = read_rows(ROOT / "results" / f"{sweep.name}.jsonl")
    assert rows and all(row["sweep"] == sweep.name for row in rows)
    assert all(hashes[row["point"], row["seed"]] == row["config_hash"] for row in rows)


def test_the_sweep_of_the_documentation_is_one(tmp_path):
    text = (ROOT / "docs" / "recipes.md").read_text()
    (tmp_path / "mine.py").write_text(text.split("```python\n")[1].split("```")[0])
    runs = load_sweep(str(tmp_path / "mine.py")).runs
    for run in runs:
        validate(run.config({}), 1, REGISTRIES)
    assert len({run.config_hash for run in runs}) == 9


def test_the_tables_of_the_results_are_of_the_rows(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "results.md").read_text()
    assert text.count("<!-- experiments.tables ") == text.count("|---|---|\n") > 5
    assert tables.update_page(text) == text
    altered = text.replace(" ± 0.0", " ± 0.9", 1)
    assert altered != text and tables.update_page(altered) == text


def test_shards_share_all_runs_and_places_are_no_part_of_a_run(folder):
    sweep = digits.get_sweep()
    parts = [select(sweep, f"{i}/7") for i in range(7)]
    assert sorted(run.name for part in parts for run in part) == sorted(r.name for r in sweep.runs)
    run = sweep.runs[0]
    assert run.config({"data.path": "somewhere"}).data.path == "somewhere"
    with pytest.raises(UserError, match=r"training.k: only data.path"):
        parse_machine_paths(["training.k=2"])
    for shard in ("2/2", "x"):
        with pytest.raises(UserError, match="--shard"):
            select(sweep, shard)
    with pytest.raises(UserError, match="no sweep file"):
        load_sweep(str(folder / "nowhere.py"))


def make_row(point, seed, of_images=(), test_loss=(), **scores):
    row = {"sweep": "s", "point": point, "seed": seed, "config_hash": "0", "scores": scores}
    return {**row, "of_images": {"nll": list(of_images)}, "test_loss": list(test_loss)}


def test_rows_added_at_once_are_all_there(tmp_path):
    path = tmp_path / "rows.jsonl"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: add_row(make_row("a", seed), path), range(8)))
    assert sorted(row["seed"] for row in read_rows(path)) == list(range(8))


def test_rows_that_do_not_belong_together_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match="has no rows"):
        read_sweep(path)
    first = {"nll_steps": 64, "nll_nfe": 65.0, "classifier_weights": "a"}
    add_row(make_row("a", 0, **first), path)
    whole = path.read_text()
    for other, message in (
        ({"classifier_weights": "b"}, "more than one classifier"),
        ({"nll_steps": 24, "nll_nfe": 96.0}, "more than one NLL solver"),
        ({"nll_steps": 0, "nll_nfe": 65.0, "rtol": 1e-5}, "more than one NLL solver"),
    ):
        path.write_text(whole)
        add_row(make_row("a", 1, **other), path)
        with pytest.raises(UserError, match=message):
            read_sweep(path)
    for damaged in ("{", "[]", '{"point": []}', "7"):
        path.write_text(whole + damaged)
        with pytest.raises(UserError, match="line 2: no row"):
            read_rows(path)
    path.write_text(whole * 2)
    with pytest.raises(UserError, match="line 2: a has a row of seed 0 already"):
        read_rows(path)


def test_tables_say_mean_and_error(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    for seed, (off, on) in enumerate([(3.0, 2.5), (3.2, 2.7), (3.4, 2.9)]):
        add_row(make_row("ve_fixed_1e-5", seed, nll=off, fd_classifier=1.0 + seed), path)
        add_row(make_row("ve_soft_k1", seed, nll=on), path)
    add_row(make_row("rve_soft_k1", 0, nll=4.0, nll_stderr=0.25, fd_classifier=2.0), path)
    assert tables.main([str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "|  | NLL | distance | seeds |",
        "|---|---|---|---|",
        "| ve fixed ε = 1e-5 | 3.20 ± 0.12 | 2.00 ± 0.58 | 3 |",  # 0.2 / √3
        "| ve soft, k = 1 | 2.70 ± 0.12 |  | 3 |",
        "| rve soft, k = 1 | 4.00 ± 0.25* | 2.000* | 1 |",
    ]
    compared = ["--points", "soft_k1", "--minus", "fixed_1e-5", "--by", "ve_", "rve_"]
    assert tables.main([str(path), *compared, "--scores", "nll"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "|  | NLL, ve | NLL, rve | seeds |",
        "|---|---|---|---|",
        "| soft, k = 1 minus fixed ε = 1e-5 | -0.5000 ± 0.0000 |  | 3 |",
    ]
    assert tables.main([str(path), "--points", "nothing"]) == 2
    assert capsys.readouterr().err == "error: no row is of nothing\n"
    assert tables.main([str(path), "--scores", "fid"]) == 2
    assert "no row has such scores" in capsys.readouterr().err


def test_a_difference_of_one_seed_has_the_errors_of_that_seed():
    first = [make_row("a", 0, nll=1.0, nll_stderr=100.0), make_row("a", 1, nll=2.0, nll_stderr=0.3)]
    score = tables.get_difference(first, [make_row("b", 1, nll=2.5, nll_stderr=0.4)], "nll")
    assert score.num_seeds == 1
    np.testing.assert_allclose([score.value, score.error], [0.5, 0.5])


def test_the_error_of_a_difference_is_of_the_images_differences():
    first, second = (
        [make_row("a", 0, of_images, nll=np.mean(of_images))]
        for of_images in ([1.0, 3.0, 8.0], [1.1, 3.3, 8.2])
    )
    assert tables.get_difference(first, second, "nll") == tables.Score(
        pytest.approx(0.2), pytest.approx(0.1 / 3**0.5), 1
    )
    assert tables.get_difference(first, [second[0] | {"of_images": {}}], "nll").error is None


@pytest.mark.parametrize("what", ["scores", "losses"])
def test_figures_are_drawn_of_series_of_points(what, tmp_path, capsys):
    path, picture = tmp_path / "rows.jsonl", tmp_path / "figure.png"
    for seed in (0, 1):
        for k in (1.0, 2.0):
            scores = {"nll": k + seed, "fd_classifier": 2 * k + seed}
            add_row(make_row(f"soft_k{k:g}", seed, test_loss=[[1, 2.0], [2, k]], **scores), path)
    series = figures.get_series(read_sweep(path), ["first=.*1$", "all=soft"])
    assert {name: len(points) for name, points in series.items()} == {"first": 1, "all": 2}
    assert figures.main([what, str(picture), str(path), "--series", "k=soft_k"]) == 0
    with Image.open(picture) as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 10
    assert figures.main([what, str(picture), str(path), "--series", "k=other"]) == 2
    assert "'k=other': no point's name begins so" in capsys.readouterr().err


def test_crops_of_a_photograph_are_in_one_split(tmp_path, monkeypatch):
    few = {group: dict.fromkeys(parts, 10) for group, parts in make_data.CROPS.items()}
    monkeypatch.setattr(make_data, "CROPS", few)
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):  # each of one grey of its own
        Image.new("RGB", (40, 50), (40 * i,) * 3).save(path)
    make_data.make_photographs(tmp_path / "out", paths, 16)
    greys = {}
    for part in ("training/train", "training/test", "features/train", "validation"):
        images = [np.asarray(Image.open(p)) for p in (tmp_path / "out" / part).rglob("*.png")]
        assert {image.shape for image in images} == {(16, 16, 3)}
        greys[part] = {int(image.mean()) for image in images}
    assert greys["training/train"] == greys["features/train"] == {0, 40, 80}
    assert greys["validation"] == {120} and greys["training/test"] == {160}
    with pytest.raises(UserError, match="5 or more"):
        make_data.make_photographs(tmp_path / "few", paths[:4], 16)
