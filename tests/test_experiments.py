import json
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import evaluation
import run_lib
import sde_lib
from build import REGISTRIES
from configs.validate import validate
from errors import UserError
from experiments import (
    claim_fashion_mnist,
    claim_fashion_mnist_long,
    claim_fashion_mnist_longest,
    claim_photographs,
    claim_tables,
    digits,
    loss_by_time,
    make_data,
    tables,
)
from experiments import run as runner
from experiments.figures import Score
from experiments.grid import TABLES
from experiments.sweep import load_sweep, parse_machine_paths, select
from metrics.report import write_bits
from runtime import environment
from tests.helpers import times_of_step

ROOT = pathlib.Path(__file__).parent.parent
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
    """The exit status of the runner, which leaves rows in <name> and workdirs in <name>_runs."""
    paths = [str(folder / "tiny.py"), "--out", str(folder / name)]
    paths += ["--workdirs", str(folder / f"{name}_runs")]
    return runner.main([*paths, f"--set=eval.cache_dir={folder / 'cache'}", *options])


def read_rows(folder):
    """Rows by name, without what differs from run to run."""
    rows = {path.stem: json.loads(path.read_text()) for path in (folder / "rows").glob("*.json")}
    for row in rows.values():
        for name in ("images_per_second", "train_seconds", "eval_seconds"):
            row.pop(name)
    return rows


def assert_same_tables(folder, *names):
    for name in names:
        tables.write_tables(folder / name, folder / f"{name}_tables")
    first, second = ((folder / f"{name}_tables" / "tables.md").read_text() for name in names)
    assert first == second and "not run" in first


@pytest.fixture(scope="module")
def trained(folder):
    """The name of one run's rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "prepare", lambda: None)
        assert sweep_main(folder, "trained", "--only=soft") == 0
    return "trained"


@pytest.mark.slow
def test_a_run_leaves_a_row_with_its_scores(folder, trained):
    ((name, row),) = read_rows(folder / trained).items()
    assert name == RUNS[1] and row["steps"] == 4 and row["seed"] == 0
    assert row["overrides"] == {"training.k": 1.0} and row["versions"]["jax"] == jax.__version__
    scores = row["scores"]
    assert np.isfinite(scores["fd_classifier"]) and scores["fd_classifier_stderr"] > 0
    assert len(scores["classifier_weights"]) == 64


@pytest.mark.parametrize(
    "real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["stand_ins", "real"]
)
def test_shards_and_a_cut_give_the_same_table(folder, real, request, monkeypatch, capsys):
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
    assert sorted(read_rows(folder / parts)) == RUNS[:1]
    assert sweep_main(folder, parts, "--shard=1/2") == 0
    assert (folder / f"{parts}_runs" / RUNS[1] / "checkpoints").exists()
    assert read_rows(folder / parts) == read_rows(folder / whole)
    monkeypatch.setattr(run_lib, "train", cut)  # whatever is done is not done again
    assert sweep_main(folder, parts) == 0
    assert_same_tables(folder, parts, whole)


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
    assert list(read_rows(folder / out)) == [other]
    assert sweep_main(folder, out) == 0
    assert sorted(read_rows(folder / out)) == RUNS


def test_a_row_of_another_config_is_refused(folder, stand_ins, monkeypatch, capsys):
    assert sweep_main(folder, "other", "--only=soft") == 0
    path = folder / "other" / "rows" / f"{RUNS[1]}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config_hash": "0"}))
    monkeypatch.setattr(run_lib, "train", None)
    assert sweep_main(folder, "other") == 2
    error = capsys.readouterr().err.strip()
    assert RUNS[1] in error and "another config" in error and "\n" not in error


@pytest.mark.slow
def test_losses_by_time_of_a_run(folder, trained):
    (run,) = select(load_sweep(str(folder / "tiny.py")), only="soft")
    workdir = folder / f"{trained}_runs" / run.name
    sizes = {"num_times": 3, "num_batches": 4, "truncations": ("soft",), "num_steps": 3}
    measured = loss_by_time.measure(run, workdir, **sizes)
    rows = measured["by_time"]
    assert [row["share_of_steps"] for row in rows] == pytest.approx([0, 0.5, 1], abs=1e-4)
    assert all(row["plain_loss"] > 0 and row["plain_loss_variance"] > 0 for row in rows)
    assert all(row["grad_variance"] > 0 for row in rows)
    assert measured["objectives"]["soft"]["grad_variance"] > 0
    json.dumps(measured)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["vp_soft_k1", "vp_variance_soft", "ve_soft", "vp_fixed_1e-3"])
def test_the_density_of_times_is_that_of_training(point):
    (run,) = select(digits.get_sweep(), only=f"^{point}_seed0")
    config = run.config()
    sde = sde_lib.get_sde(config)
    drawn = jax.vmap(lambda step: times_of_step(config, sde, step)[1])(jnp.arange(2000))
    edges = np.geomspace(config.training.truncation_time, 0.99, 401)
    density = loss_by_time.density_of_times(config, sde, edges)
    for low, high in ((0, 200), (200, 300), (300, 400)):
        part = slice(low, high + 1)
        expected = np.trapezoid(density[part], np.log(edges[part]))
        share = np.mean((drawn >= edges[low]) & (drawn < edges[high]))
        assert share == pytest.approx(expected, abs=0.02)


def test_gradients_are_told_from_their_noise():
    rng, gradients = np.random.default_rng(0), loss_by_time._Gradients()
    for _ in range(400):
        noise = jnp.asarray(0.5 * rng.standard_normal(100))
        gradients.add(jnp.asarray(rng.standard_normal()), {"a": 0.2 + noise})
    found = gradients.summary()
    assert found["grad_norm"] == pytest.approx(2, rel=0.05)  # 0.2 √100
    assert found["grad_variance"] == pytest.approx(25, rel=0.05)
    assert found["loss_variance"] == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize(
    "module, count",
    [
        (digits, 60),
        (claim_photographs, 54),
        (claim_fashion_mnist, 52),
        (claim_fashion_mnist_long, 52),
        (claim_fashion_mnist_longest, 52),
    ],
)
def test_all_points_are_valid_and_none_is_there_twice(module, count):
    sweep = module.get_sweep()
    for run in sweep.runs:
        validate(run.config({"data.path": "here"} if sweep.prepared else {}), 1, REGISTRIES)
    assert len({run.config_hash for run in sweep.runs}) == len(sweep.runs) == count


@pytest.mark.parametrize(
    "rows", sorted(ROOT.glob("results/**/rows")), ids=lambda x: str(x.parent.relative_to(ROOT))
)
def test_the_rows_in_results_are_of_the_sweeps_as_they_are(rows, monkeypatch):
    found = {path.stem: json.loads(path.read_text()) for path in rows.glob("*")}
    (name,) = {row["sweep"] for row in found.values()}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu" if "_32" in name else "cpu")
    sweep = load_sweep(f"{ROOT}/experiments/{name.replace('_32', '')}.py")
    hashes = {run.name: run.config_hash for run in sweep.runs}
    assert sweep.name == name
    assert {run: row["config_hash"] for run, row in found.items()}.items() <= hashes.items()


def test_the_differences_in_the_results_are_of_the_rows():
    text = (ROOT / "results/README.md").read_text()
    tables_of_rows = claim_tables.get_comparisons(sorted(ROOT.glob("results/claim_*")))
    assert all(table in text for table in tables_of_rows.split("\n\n"))


def test_the_tables_of_digits_have_all_its_points():
    in_tables = {point for entries in TABLES.values() for _, point in entries}
    assert in_tables == set(digits.get_sweep().points)


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


def synthetic(folder, point, seed, **scores):
    row = {"sweep": "s", "point": point, "seed": seed, "scores": scores}
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    (folder / "rows" / f"{point}_seed{seed}.json").write_text(json.dumps(row))


def test_tables_say_mean_and_error(tmp_path):
    for seed, (off, on) in enumerate([(3.0, 2.5), (3.2, 2.7), (3.4, 2.9)]):
        synthetic(tmp_path, "ve_fixed", seed, nll=off, fd_classifier=1.0 + seed)
        synthetic(tmp_path, "ve_soft", seed, nll=on)
    synthetic(tmp_path, "rve_soft", 0, nll=4.0, nll_stderr=0.25, fd_classifier=2.0)
    drawn = tables.write_tables(tmp_path, tmp_path / "out")
    assert [path.name for path in drawn] == ["c.png"] and drawn[0].stat().st_size < 100_000
    text = (tmp_path / "out" / "tables.md").read_text()
    # 0.2 / √3
    assert "| VE: fixed ε | 3.20 ± 0.12 | not run | not run | 2.00 ± 0.58 | 3 |" in text
    assert "| RVE: soft truncation | 4.00 ± 0.25* | not run | not run | 2.000* | 1 |" in text
    assert "VE: soft truncation less fixed ε | -0.5000 ± 0.0000 |" in text


def test_rows_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no rows"):
        tables.load_rows(tmp_path)
    synthetic(tmp_path, "ve_soft", 0, nll=1.0, classifier_weights="a")
    synthetic(tmp_path, "ve_soft", 1, nll=1.0, classifier_weights="b")
    with pytest.raises(UserError, match="more than one classifier"):
        tables.load_rows(tmp_path)


@pytest.mark.parametrize(
    "first, second",
    [
        ({"nll_steps": 64, "nll_nfe": 65.0}, {"nll_steps": 24, "nll_nfe": 96.0}),
        ({"nll_steps": 64, "nll_nfe": 65.0}, {"nll_steps": 0, "nll_nfe": 65.0, "rtol": 1e-5}),
    ],
)
def test_rows_of_two_nll_solvers_are_refused(tmp_path, first, second):
    synthetic(tmp_path, "ve_soft", 0, nll=1.0, **first)
    synthetic(tmp_path, "ve_soft", 1, nll=1.0, **second)
    with pytest.raises(UserError, match="more than one NLL solver"):
        tables.load_rows(tmp_path)


def test_a_difference_of_one_seed_has_the_errors_of_that_seed():
    def row(seed, value, error):
        return {"seed": seed, "scores": {"nll": value, "nll_stderr": error}}

    score = tables.get_difference([row(0, 1.0, 100.0), row(1, 2.0, 0.3)], [row(1, 2.5, 0.4)], "nll")
    assert score.num_seeds == 1
    np.testing.assert_allclose([score.value, score.error], [0.5, 0.5])


def test_scores_of_an_earlier_checkpoint_make_no_row(folder, stand_ins, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "evaluate", lambda config, workdir: {"step": 1, "nll": 1.0})
    assert sweep_main(folder, "earlier") == 1
    assert not (folder / "earlier" / "rows").exists()


def test_the_claims_tables_compare_with_the_best_fixed_truncation_of_validation(tmp_path):
    common = {"num_test_images": 8, "num_samples": 9, "sampling_nfe": 13}
    common |= {"fd_classifier_of_test_images": 0.5, "nll_steps": 24, "nll_nfe": 25.0}
    for seed in (0, 1):
        for point, validation, nll in (
            ("noise_fixed_1e-4", 2.0, 2.5),
            ("noise_fixed_1e-5", 2.1, 2.4),  # better on test images, which do not choose
            ("noise_soft_k1", 2.2, 2.3 + 0.1 * seed),
        ):
            scores = {"nll": nll, "validation_nll": validation, "fd_classifier": 3.0}
            synthetic(tmp_path, point, seed, **scores, **common)
            path = tmp_path / "rows" / f"{point}_seed{seed}.json"
            row = json.loads(path.read_text()) | {"steps": 7, "device": "cpu"}
            path.write_text(json.dumps(row))
    claim_tables.write_tables(tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "Less fixed, ε = 1e-4, the best fixed ε by validation NLL" in text
    assert "| soft, k = 1 | -0.150 ± 0.050 |  | 0.0000 ± 0.0000 |  |  | 2 |" in text
    assert (tmp_path / "tradeoff.png").stat().st_size > 10_000
    compared = claim_tables.get_comparisons([tmp_path])
    assert "\n\n" not in compared  # only soft truncation with the noise has a pair
    assert "| s, 7 steps | -0.050 ± 0.050 | 0.0000 ± 0.0000 | -0.150 ± 0.050 |" in compared


def test_a_loss_is_given_the_step_at_which_the_equivalent_weight_had_it():
    rows = {
        "velocity_soft_k1": [{"test_loss": [[10, 3.0], [30, 2.5], [40, 1.5]]}],
        "velocity_weight_k1": [{"test_loss": [[10, 2.5], [20, 2.0], [30, 2.2], [40, 1.0]]}],
        "noise_soft_k1": [{"test_loss": [[10, 3.0]]}],  # without its weight
    }
    table = claim_tables._loss_table(claim_tables._losses(rows))
    assert table[2:] == [
        "| velocity | 10 | 3.0000 | 2.5000 |  |",
        f"| velocity | 40 | 1.5000 | 1.0000 | {(30 * 40) ** 0.5:.0f} |",
    ]


def test_the_weights_speed_is_of_pairs_of_one_seed():
    def row(seed, *losses):
        return {"seed": seed, "test_loss": list(zip((10, 20, 40), losses, strict=True))}

    rows = {
        "velocity_soft_k1": [row(0, 4, 3, 2), row(1, 4, 3, 2.5), row(2, 4, 3, 1)],
        "velocity_weight_k1": [row(1, 3, 2.5, 2), row(0, 2, 1.5, 1)],
        "noise_soft_k1": [row(0, 3, 2, 1)],
    }
    assert claim_tables._speeds(rows) == {"velocity": [pytest.approx(4), pytest.approx(2)]}


def test_the_error_of_a_difference_is_of_the_images_differences():
    first, second = (
        [{"seed": 0, "scores": {"nll": np.mean(of)}, "of_images": {"nll": of}}]
        for of in ([1.0, 3.0, 8.0], [1.1, 3.3, 8.2])
    )
    assert tables.get_difference(first, second, "nll") == Score(
        pytest.approx(0.2), pytest.approx(0.1 / 3**0.5), 1
    )
    assert tables.get_difference(first, [second[0] | {"of_images": {}}], "nll").error is None


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


def test_a_prepared_sweep_is_scored_on_folders_of_its_own(tmp_path, stand_ins, monkeypatch):
    def evaluate(config, workdir):
        parts = config.eval.enable_bpd, config.eval.enable_sampling, config.eval.images
        names = ("nll", "nll_stderr", "nelbo", "nelbo_stderr")
        value = {"training": 1.0, "features": 2.0}[pathlib.Path(config.data.path).name]
        scores = dict.fromkeys(names, 3.0 if parts[2] else value) if parts[0] else {}
        if parts[1] and not parts[2]:
            scores["fd_classifier"] = value
        if parts[2] == "test":
            scores |= dict.fromkeys(names, value)
        if parts[2]:
            kept = workdir / "eval" / f"images_{pathlib.Path(parts[2]).name}"
            kept.mkdir(parents=True, exist_ok=True)
            columns = {"nelbo": np.full(2, scores["nelbo"]), "nll": np.full(2, scores["nll"])}
            write_bits(kept / "bits_per_dim.csv", ["0", "7"], columns)
        return {"step": config.training.n_iters, **scores}

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    run, paths = claim_photographs.get_sweep().runs[0], {"data.path": str(tmp_path)}
    with pytest.raises(UserError, match=r"needs --set data\.path=DIR, a folder that"):
        runner._compute_row(run, tmp_path / "run", paths, {})
    (tmp_path / "training").mkdir()
    row = runner._compute_row(run, tmp_path / "run", paths, {})
    scores = row["scores"]
    assert (scores["nll"], scores["validation_nll"], scores["fd_classifier"]) == (1.0, 3.0, 2.0)
    assert row["of_images"] == {"nll": [1.0, 1.0], "nelbo": [1.0, 1.0]}
    assert row["test_loss"] == [(1, 0.5)]
