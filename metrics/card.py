"""The model card of an exported model."""

import pathlib
from typing import Any

from clu.parameter_overview import count_parameters

from build import Setup
from metrics.report import read_report, remarks, table
from runtime import provenance
from runtime.workdir import short_hash


def _report_of(workdir: pathlib.Path, step: int, params: Any) -> dict[str, Any] | None:
    """The report of these weights in a run's eval/, if there is one."""
    digest = short_hash(params)
    for folder in (workdir / "eval", workdir / "eval" / f"step_{step:08}"):
        report = read_report(folder)
        if report.get("weights_digest") == digest:
            return report
    return None


def model_card(name: str, setup: Setup, workdir: pathlib.Path, step: int, params: Any) -> str:
    """The README.md of an exported model.

    Args:
      name: the model's name.
      setup: the parts of the run.
      workdir: the run, whose report is quoted if it is of these weights.
      step: the step of the weights.
      params: the weights.
    """
    data = setup.fields["data"]
    own = data["dataset"] == "folder"  # which only their owner has
    what, where = (data["path"], " --config.data.path=IMAGES") if own else (data["dataset"], "")
    about = {
        "data": f"{what}, {'×'.join(map(str, setup.shape))}",
        "licence of the data": "not known to this program: see where they come from",
        "network": f"{setup.network}, {count_parameters(params):,} parameters, predicts the "
        f"{setup.fields['model']['parametrization']}",
        "objective": setup.objective_text,
        "optimiser": setup.optimizer_text,
        "training": f"{step:,} steps of {setup.loop.batch_size} images",
        "exported with": provenance.made_with(),
    }
    lines = [f"# {name}", "", "The EMA weights of a score-based diffusion model are in "]
    lines[-1] += "`model.safetensors`, the recipe is in `config.json`."
    lines += ["", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in about.items())]
    lines += ["", "```sh", "python main.py --workdir FOLDER --mode sample"]
    lines += [f"python main.py --workdir FOLDER --mode eval{where}", "```", "", "## Scores", ""]
    report = _report_of(workdir, step, params)
    if report is None:
        return "\n".join([*lines, "These weights have not been evaluated."]) + "\n"
    return "\n".join([*lines, table(report), "", *(f"- {x}" for x in remarks(report))]) + "\n"
