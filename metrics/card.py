"""The model card of an exported model."""

import pathlib
from typing import Any

from clu.parameter_overview import count_parameters

from build import Setup
from metrics.report import read_report, remarks, table
from runtime import provenance
from runtime.exported import PICTURE
from runtime.workdir import short_hash


def _report_of(workdir: pathlib.Path, step: int, params: Any) -> dict[str, Any]:
    """The report of these weights in a run's eval/, or that of the nearest step; else empty."""
    folders = [workdir / "eval", *(workdir / "eval").glob("step_*")]
    reports = [report for report in map(read_report, folders) if "weights_digest" in report]
    digest = short_hash(params)
    if same := [report for report in reports if report["weights_digest"] == digest]:
        return same[0]
    others = [x for x in reports if isinstance(x.get("step"), int) and x["step"] != step]
    return min(others, key=lambda x: abs(x["step"] - step), default={})


def find_grid(workdir: pathlib.Path, step: int) -> pathlib.Path | None:
    """A grid of samples of a run's checkpoint, or of an exported model, if there is one."""
    places = ["eval/step_{:08}/samples.png", "samples/step_{:08}.png", PICTURE]
    grids = [workdir / place.format(step) for place in places]
    if read_report(workdir / "eval").get("step") == step:
        grids.insert(0, workdir / "eval" / "samples.png")
    return next((path for path in grids if path.is_file()), None)


def _front_matter(license_name: str) -> list[str]:
    """What the Hugging Face hub reads."""
    lines = [f"license: {license_name}"] if license_name else []
    lines += ["library_name: soft-truncation", "pipeline_tag: unconditional-image-generation"]
    return ["---", *lines, "tags: [score-based-diffusion, soft-truncation, jax]", "---", ""]


def model_card(
    name: str, setup: Setup, workdir: pathlib.Path, step: int, params: Any, grid: bool
) -> str:
    """The README.md of an exported model.

    Args:
      name: the model's name.
      setup: the parts of the run.
      workdir: the run, whose report is quoted: that of these weights, or of the nearest step.
      step: the step of the weights.
      params: the weights.
      grid: whether the model has a grid of samples.
    """
    data, license_name = setup.fields["data"], setup.fields["model"]["license"]
    own = data["dataset"] == "folder"  # which only their owner has
    what = f"own images (`{data['path']}`)" if own else data["dataset"]
    version, address = provenance.project()
    project = "Soft truncation in JAX" if "/OWNER/" in address else f"[Soft truncation]({address})"
    about = {
        "data": f"{what}, {'×'.join(map(str, setup.shape))}",
        "licence of the weights": license_name or "not stated",
        "licence of the data": "not known to this program: see where they come from",
        "network": f"{setup.network}, {count_parameters(params):,} parameters, predicts the "
        f"{setup.fields['model']['parametrization']}",
        "objective": setup.objective_text,
        "optimiser": setup.optimizer_text,
        "training": f"{step:,} steps of {setup.loop.batch_size} images",
        "exported with": provenance.made_with(),
    }
    lines = [*_front_matter(license_name), f"# {name}", ""]
    lines += ["The EMA weights of a score-based diffusion model are in `model.safetensors`, the"]
    lines += [f"recipe is in `config.json`. It was made with {project}, version {version}."]
    lines += ["", f"![Samples]({PICTURE})"] if grid else []
    lines += ["", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in about.items())]
    lines += ["", "```sh", "python main.py --workdir FOLDER --mode sample"]
    where = " --config.data.path=IMAGES" if own else ""
    lines += [f"python main.py --workdir FOLDER --mode eval{where}", "```", "", "```python"]
    lines += ["import soft_truncation as st", "", 'model = st.load("FOLDER")  # or hf://user/name']
    lines += ["images = model.sample(16, seed=0)", "```", "", "## Scores", ""]
    report = _report_of(workdir, step, params)
    if not report:
        return "\n".join([*lines, "These weights have not been evaluated."]) + "\n"
    if report.get("step", step) != step:
        lines += [f"**Of step {report['step']}; the weights are of step {step}.**", ""]
    return "\n".join([*lines, table(report), "", *(f"- {x}" for x in remarks(report))]) + "\n"
