"""Each notebook runs from top to bottom with small parameters, and finds what its text says."""

import dataclasses
import io
import json
import pathlib
import re
import subprocess
import sys
import tomllib
import types
import urllib.request
from collections.abc import Callable
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement

import run_lib
from runtime import colab, provenance
from tests.helpers import environment_of, tiny_config

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))


@dataclasses.dataclass(frozen=True)
class Run:
    """How a notebook is run here.

    Attributes:
      parameters: (an empty folder) → values in place of those of its cell of parameters.
      results: expressions of the notebook's variables, by name, that JSON can write.
      check: asserts on their values.
    """

    parameters: Callable[[pathlib.Path], dict[str, Any]]
    results: dict[str, str]
    check: Callable[[dict[str, Any]], None]


def sampling_parameters(folder):
    config = tiny_config(n_iters=120, batch_size=32, snapshot_freq=120)
    config.training.snapshot_freq_for_preemption = 120
    config.optim.lr = 1e-2
    config.model.ema_rate = 0.9
    # Fewer networks to compile.
    config.sampling.update(method="dpm_solver", noise_removal=False)
    run_lib.train(config, folder / "run")
    return {
        "WORKDIR": str(folder / "run"),
        "NUM_IMAGES": 8,
        "NUM_COMPARED": 4,
        "NUM_FOLLOWED": 2,
        "NUM_TIMES": 4,
        "NUM_SHARES": 3,
        "NUM_PC_STEPS": 50,
        "NUM_STEPS": 40,
        "NUM_COMPLETIONS": 2,
    }


def check_sampling(found):
    assert found["step"] == 120
    lowest, highest, kinds = found["levels"]
    assert 0 <= lowest < highest <= 16 and kinds > 10
    assert found["finite"]
    # The guess is far from the state at first, and close to it in the end.
    assert found["guess_distance"][-1] < 0.1 < 0.5 < found["guess_distance"][0]
    evaluations, differences = found["evaluations"], found["differences"]
    assert (evaluations["PC"], evaluations["Heun"], evaluations["DPM-Solver++"]) == (98, 80, 40)
    # The same images from the same latents; PC gives others.
    assert max(differences["Heun"], differences["DPM-Solver++"]) < 0.05
    assert differences["PC"] > 0.4
    assert found["round_trip"] < 0.02
    assert 0.7 < found["radius"] < 1.3
    assert found["known_changed"] < 1e-6
    assert found["unknown_changed"] > 0.05


def soft_truncation_parameters(_):
    return {
        "PRIOR_DRAWS": 2000,
        "CHECK_DRAWS": 20_000,
        "HIDDEN": 32,
        "LEARNING_RATE": 5e-3,
        "STEPS": 500,
        "SEEDS": 2,
        "TIMES": 25,
        "ERROR_POINTS": 200,
        "NOISE_BATCHES": 200,
        "SAMPLES": 500,
        "SAMPLER_STEPS": 10,
        "NLL_POINTS": 32,
    }


def check_soft_truncation(found):
    assert min(found["prior_pvalues"]) > 1e-3
    assert len(found["check_z"]) == 10 and max(map(abs, found["check_z"])) < 4
    # Soft truncation and its equivalent weight, on a network.
    assert abs(found["expectation_z"]) < 4
    # The exact score has the exact likelihood, to the noise.
    assert abs(found["exact_excess"]) < 0.1
    assert found["finite"]
    # Nats below t = 0.001, where the large ε is not trained; over all t an untrained one has 16.
    assert found["small_t"][0] > 5 * found["small_t"][1]
    assert max(found["all_t"][1:4]) < 3
    assert found["noise"][4] > 4 * found["noise"][1]  # uniform against importance-sampled times


def check_official_checkpoint(found):
    assert found["largest_gap"] == 0
    assert max(found["score_errors"].values()) < 1e-5  # against the official code's own scores
    other, code = found["refusals"]
    assert "does not fit the config" in other and "it names __builtin__.print" in code
    assert found["samples"] == [4, 16, 16, 3]
    assert 0 < found["nll"] < 100 and not found["torch"]
    assert found["steps"] == [1234, 1236]


RUNS = {
    "sampling": Run(
        sampling_parameters,
        {
            "step": "int(state.step)",
            "levels": "[int(levels.min()), int(levels.max()), len(np.unique(levels))]",
            "finite": "all(bool(np.isfinite(x).all()) for x in (states, path, completed))",
            "guess_distance": "[float(np.abs(x - y).mean()) for x, y in zip(states, guesses)]",
            "evaluations": "{name: nfe for name, (_, nfe, _) in results.items()}",
            "differences": "differences",
            "round_trip": "round_trip",
            "radius": "radius",
            "known_changed": "float(np.abs((1 - masks) * (completed[:, 0] - originals)).max())",
            "unknown_changed": "float(np.abs(masks * (completed[:, 0] - originals)).mean())",
        },
        check_sampling,
    ),
    "soft_truncation": Run(
        soft_truncation_parameters,
        {
            "prior_pvalues": "prior_pvalues",
            "check_z": "[float(z) for z in check_z]",
            "expectation_z": "float(expectation_z)",
            "exact_excess": "float(exact_excess)",
            "finite": "bool(all(np.isfinite(x).all() for x in (errors, samples, excess)))",
            "small_t": "areas['t < 0.001'].mean(axis=0).tolist()",
            "all_t": "areas['all t, nats'].mean(axis=0).tolist()",
            "noise": "np.sqrt(squares.mean(axis=0)).tolist()",
        },
        check_soft_truncation,
    ),
    "official_checkpoint": Run(
        lambda _: {"NUM_IMAGES": 4, "TRAIN_STEPS": 2},
        {
            "largest_gap": "largest_gap",
            "score_errors": "score_errors",
            "refusals": "refusals",
            "samples": "samples.shape",
            "nll": "report['nll']",
            "torch": "'torch' in sys.modules",
            "steps": "[int(imported.step), int(trained.step)]",
        },
        check_official_checkpoint,
    ),
}


def outputs(notebook):
    """(place of the cell, output) of all code cells."""
    for place, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            yield place, output


def cells_with_figures(notebook):
    return [place for place, output in outputs(notebook) if "image/png" in output.get("data", ())]


def with_parameters(notebook, parameters):
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    for name, value in parameters.items():
        assert re.search(rf"^{name} = ", cell.source, re.MULTILINE), f"no parameter {name}"
        cell.source += f"\n{name} = {value!r}"


def test_every_notebook_is_run():
    assert {path.stem for path in PATHS} == set(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    # One device, as a person's machine has: it compiles faster than conftest.py's four.
    monkeypatch.setenv("XLA_FLAGS", environment_of(1)["XLA_FLAGS"])
    path, run = FOLDER / f"{name}.ipynb", RUNS[name]
    notebook = nbformat.read(path, as_version=4)
    with_parameters(notebook, run.parameters(tmp_path))
    found = ", ".join(f"{name!r}: {expression}" for name, expression in run.results.items())
    last = nbformat.v4.new_code_cell(f"import json\n\nprint(json.dumps({{{found}}}))")
    notebook.cells.append(last)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}})
    client.execute()  # a cell that fails raises, with its traceback
    assert not [output for _, output in outputs(notebook) if output.output_type == "error"]
    assert cells_with_figures(notebook) == cells_with_figures(nbformat.read(path, as_version=4))
    run.check(json.loads(last.outputs[-1].text))


def cells_that_find_the_code():
    return [nbformat.read(path, as_version=4).cells[1] for path in PATHS]


def test_the_cell_that_finds_the_code_is_the_same_in_all():
    (source,) = {cell.source for cell in cells_that_find_the_code()}
    assert source.startswith("# @title Find the code, or fetch it\n")
    assert {cell.metadata["cellView"] for cell in cells_that_find_the_code()} == {"form"}


def test_all_name_the_address_of_the_project():
    _, address = provenance.project()
    for path in PATHS:
        text = path.read_text()
        assert set(re.findall(r"https://github\.com/[\w.-]+/[\w.-]+", text)) == {address}
        place = address.removeprefix("https://github.com/")
        assert f"/github/{place}/blob/main/notebooks/{path.name})" in text


@pytest.fixture
def find_the_code(tmp_path, monkeypatch):
    """Run that cell in an empty folder of Colab, whose server answers with a text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("colab"))
    commands = []

    def clone(command, check):
        commands.append(command)
        pathlib.Path(command[-1]).mkdir()

    def find(answer):
        monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(answer))
        monkeypatch.setattr(subprocess, "run", clone)
        monkeypatch.setattr(colab, "install", lambda: None)
        exec(cells_that_find_the_code()[0].source, {})
        return commands[-1][-2]

    return find


def test_the_code_is_fetched_from_where_colab_opened_the_notebook(find_the_code):
    path = "fileId=https%3A%2F%2Fgithub.com%2Fme%2Fmy-copy.1%2Fblob%2Fmain%2Fnotebooks%2Fx.ipynb"
    answer = json.dumps([{"name": "x.ipynb", "path": path}]).encode()
    assert find_the_code(answer) == "https://github.com/me/my-copy.1"


def test_without_an_address_a_line_names_the_cell(find_the_code, tmp_path):
    with pytest.raises(SystemExit, match=r"^In this cell, set REPOSITORY to the address") as told:
        find_the_code(b'[{"path": "fileId=1a2b"}]')
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


@pytest.fixture
def colab_with(monkeypatch):
    """Pretend that these versions are installed; the lines and constraints that pip receives."""
    given = []

    def run(command):
        given.extend([line for line in command if ">=" in line])
        given.append(pathlib.Path(command[-1]).read_text().splitlines())
        return subprocess.CompletedProcess(command, 0)

    def pretend(**versions):
        there = {x: y.specifier for x, y in needed().items()}
        found = {name: str(next(iter(there[name])).version) for name in there} | versions
        packages = [types.SimpleNamespace(name=x, version=y) for x, y in found.items() if y]
        monkeypatch.setattr(colab, "distributions", lambda: packages)
        monkeypatch.setattr(colab.subprocess, "run", run)
        monkeypatch.setattr(colab.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
        return given

    return pretend


def needed():
    lines = tomllib.loads(colab.PROJECT.read_text())["project"]["dependencies"]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def test_colab_installs_what_is_missing_and_holds_the_rest(colab_with):
    given = colab_with(clu=None, diffrax=None, jax="0.7.2", torch="2.8.0+cu126")
    colab.install()
    *lines, held = given
    assert [re.sub(">=.*", "", line) for line in lines] == ["clu", "diffrax"]
    assert "jax==0.7.2" in held and "torch==2.8.0+cu126" in held and "numpy==2.1.3" in held
    assert not [line for line in held if line.startswith("clu")]


def test_colab_replaces_what_is_too_old_and_asks_for_a_restart(colab_with):
    given = colab_with(jax="0.5.3")
    with pytest.raises(SystemExit, match=r"installed of jax: Runtime → Restart session"):
        colab.install()
    line, held = given
    assert line.startswith("jax[cuda12]>=0.7") and not [x for x in held if x.startswith("jax==")]


def test_nothing_is_installed_where_all_is_there(colab_with):
    given = colab_with(jax="0.99")
    colab.install()
    assert not given


def test_the_pins_are_no_lower_than_the_lowest_versions():
    pins = (colab.PROJECT.parent / "requirements.txt").read_text()
    for name, requirement in needed().items():
        found = re.findall(rf"(?m)^{name}==([\w.]+)", pins)
        assert found and all(requirement.specifier.contains(version) for version in found), name


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_is_committed_was_run_and_is_fit_to_be_shown(path):
    assert path.stat().st_size < 300_000
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # in order, in a fresh kernel
    assert cells_with_figures(notebook)
    for _, output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        output.get("data", {}).pop("image/png", None)
    text = json.dumps(notebook).replace("\\n", "\n")
    assert not re.search(r"(?<![\w.])/(tmp|home|work|root|Users)\b", text)
