"""Writing the report of an evaluation: the table of scores, remarks, and the best checkpoints."""

import csv
import io
import json
import logging
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from configs.saved import read_object
from runtime import provenance
from runtime.files import replacing, write_text
from runtime.workdir import first_line

log = logging.getLogger("soft_truncation")

# (name in the report, description, unit, sign), in the order of the table. The sign is 1 if less is
# better, -1 if more is better, and 0 for a baseline.
_ROWS = (
    ("nll", "NLL, with residual (a bound on the likelihood)", "bits/dim", 1),
    ("nll_without_residual", "NLL, without residual", "bits/dim", 1),
    ("nelbo", "NELBO, with residual", "bits/dim", 1),
    ("nelbo_without_residual", "NELBO, without residual", "bits/dim", 1),
    ("nelbo_lossless", "NELBO of the levels, with their decoder", "bits/dim", 1),
    ("nll_truncated_normal", "NLL of the levels, truncated-normal noise, one draw", "bits/dim", 1),
    ("nll_truncated_normal_weighted", "the same, importance-weighted draws", "bits/dim", 1),
    ("nelbo_truncated_normal", "NELBO of the levels, truncated-normal noise", "bits/dim", 1),
    ("nll_untrained_network", "NLL of the untrained network", "bits/dim", 0),
    ("nll_gaussian", "NLL of a Gaussian fitted to the training images", "bits/dim", 0),
    ("fid", "Fréchet distance on Inception, samples to training images", "", 1),
    ("kid", "kernel distance on Inception", "", 1),
    ("inception_score", "Inception score", "", -1),
    ("precision", "precision, on Inception", "", -1),
    ("recall", "recall, on Inception", "", -1),
    ("fd_classifier", "Fréchet distance, samples to training images (not FID)", "", 1),
    ("fd_classifier_of_test_images", "the same of real test images, for scale", "", 0),
    ("kid_classifier", "kernel distance (not KID on Inception)", "", 1),
    ("precision_classifier", "precision, on classifier features", "", -1),
    ("recall_classifier", "recall, on classifier features", "", -1),
    ("label_agreement", "share of the samples that the classifier calls by their label", "", -1),
    ("share_at_ends", "share of the samples' values that are the lowest or highest level", "", 0),
    ("share_at_ends_of_test_images", "the same of test images", "", 0),
)


def _shown(value: float) -> str:
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.01 else f"{value:.3g}"


def table(report: dict[str, Any]) -> str:
    """The scores of a report as a Markdown table."""
    lines = ["| score | value | standard error | unit |", "|---|---|---|---|"]
    for name, label, unit, _ in _ROWS:
        if report.get(name) is not None:
            error, of_draws = (report.get(f"{name}_{x}") for x in ("stderr", "stderr_of_draws"))
            shown = "" if error is None else _shown(error)
            shown += "" if of_draws is None else f" ({_shown(of_draws)} of draws)"
            lines.append(f"| `{name}`: {label} | {_shown(report[name])} | {shown} | {unit} |")
    return "\n".join(lines)


def channel_moments(
    batches: Iterator[np.ndarray], to_files: Callable[[np.ndarray], np.ndarray]
) -> dict[str, list[float]]:
    """The `mean` and `std` of each channel of all batches (n, H, W, C), as `to_files` gives them.

    Values that are not finite are left out.
    """
    count, mean, squares = 0.0, np.zeros(1), np.zeros(1)
    for batch in batches:
        values = to_files(batch).astype(np.float64).reshape(-1, batch.shape[-1])
        values = values[np.isfinite(values).all(axis=1)]
        if not len(values):
            continue
        # Chan's update: the difference of large sums of squares would lose small variances.
        total, own = count + len(values), values.mean(axis=0)
        squares = squares + ((values - own) ** 2).sum(axis=0)
        squares = squares + (own - mean) ** 2 * (count * len(values) / total)
        mean = mean + (own - mean) * (len(values) / total)
        count = total
    return {"mean": mean.tolist(), "std": np.sqrt(squares / max(count, 1)).tolist()}


def _table_of_channels(report: dict[str, Any]) -> list[str]:
    """Means and standard deviations of the samples' channels beside those of test images."""
    if "channels" not in report:
        return []
    drawn, real = report["channels"], report["channels_of_test_images"]
    lines = ["", "In the data's own units:", ""]
    lines += ["| channel | mean, samples | mean, test images | std, samples | std, test images |"]
    lines += ["|---|---|---|---|---|"]
    columns = drawn["mean"], real["mean"], drawn["std"], real["std"]
    for i, row in enumerate(zip(*columns, strict=True)):
        lines.append(f"| {i} | " + " | ".join(f"{value:.5g}" for value in row) + " |")
    return lines


def remarks(report: dict[str, Any]) -> Iterator[str]:
    """Sentences about how each score was computed."""
    for note in report.get("data_notes", ()):
        yield f"**{note[0].upper()}{note[1:]}.**"
    for name, label in (("untrained_network", "the untrained network"), ("gaussian", "a Gaussian")):
        if report.get(f"nll_{name}") is not None:
            gain = report[f"nll_{name}"] - report["nll"]
            verb = "beats" if gain > 0 else "does NOT beat"
            few = report.get(f"num_images_{name}", report["num_test_images"])
            of = "" if few == report["num_test_images"] else f" (itself scored on {few} of them)"
            yield (
                f"Training {verb} {label}{of} by {abs(gain):.3f} bits/dim on the test images "
                "(NLL with residual)."
            )
    if "nll" in report:
        yield _remark_on_bits(report)
    if "truncated_normal_r" in report:
        r, eps = report["truncated_normal_r"], report["truncated_normal_largest_eps"]
        most = f"a network trained with an ε of {eps:.2g} or less has 3" if eps else ""
        most = most or "this SDE has no time with 3"
        yield (
            f"Truncated-normal noise: r = {r:.3g} standard deviations are in a level's cell"
            + (f"; **below 3 the bound is loose: {most}**." if r < 3 else ".")
        )
        if report["dequantization"] == "uniform":
            yield (
                "**The network was trained on uniformly dequantised data, so that the bounds by "
                "truncated-normal noise are loose.**"
            )
    yield from _remarks_on_samples(report)


def _remark_on_bits(report: dict[str, Any]) -> str:
    draws, but = report["num_draws"], " but for the scores of levels"
    on_levels = "nelbo_lossless" in report or "nelbo_truncated_normal" in report
    solver = f"rtol {report['rtol']:g}, atol {report['atol']:g}"
    if report["nll_steps"]:
        solver = f"{report['nll_steps']} steps of a fixed size"
    what = report.get("images", "test images")
    what = what if what == "test images" else f"images of {what}"
    kind = f"{report['num_levels']} levels, uniformly dequantised{but if on_levels else ''}"
    if not report["num_levels"]:
        nats = report["nll"] * math.log(2)
        kind = (
            "floats, not dequantised: densities in the data's own units, which another unit "
            f"shifts (NLL {nats:.4f} nats a dimension)"
        )
    if report.get("padded"):
        kind += ", with the bits of their padding: a bound on those of the images"
    return (
        f"Bits/dim: {report['num_test_images']} {what}, {kind}, "
        f"{draws} draw{'s' if draws > 1 else ''} each; {report['nll_nfe']:.0f} score "
        f"evaluations a solve ({solver}), "
        f"{report['nelbo_draws']} times an image for NELBO. "
        f"The standard error is over images{' and draws' if draws > 1 else ''}."
    )


def _remarks_on_samples(report: dict[str, Any]) -> Iterator[str]:
    if "samples" in report:
        yield f"Samples: {report['num_samples']} of {report['samples']}."
    elif "num_samples" in report:
        yield f"Samples: {report['num_samples']}, {report['sampling_nfe']} score evaluations each."
        if report["num_broken_samples"]:
            yield f"**{report['num_broken_samples']} samples were not finite, and count as black.**"
    if "fid" in report:
        published = report["inception_is_published"]
        yield (
            f"Inception: {'the published' if published else 'OTHER'} weights "
            f"({report['inception_weights'][:16]}){'' if published else ', not comparable'}; "
            f"against {report['num_reference'] or 'an unknown number of'} training images. The "
            "Inception score is the mean over 10 splits, KID over disjoint subsets; their standard "
            "errors are over these. KID, precision and recall are of "
            f"{report.get('num_rows_kid', 0)} of each."
        )
    if "fd_classifier" in report:
        yield (
            "Classifier: 64 units before the logits of a network trained on the labels "
            f"(test accuracy {report['classifier_accuracy']:.3f}, weights "
            f"{report['classifier_weights'][:16]}); against {report['num_reference_classifier']} "
            f"training images. For scale, {report['num_test_images_for_scale']} test images: fewer "
            "images, larger distance."
        )


def _is_of_bits(name: str) -> bool:
    """Whether an entry of a checkpoint's report is of bits/dim, rather than of samples."""
    fields = ("num_test_images", "num_draws", "rtol", "atol", "dequantization")
    starts = ("nll", "nelbo", "truncated_normal", "num_images_")
    return name in fields or name.startswith(starts)


def read_report(folder: pathlib.Path) -> dict[str, Any]:
    """The report in `folder`; empty if there is none, or with a warning if it is damaged."""
    path = folder / "report.json"
    try:
        report = read_object(path)
        "".join([table(report), *_table_of_channels(report), *remarks(report)])  # can be shown
        return report
    except FileNotFoundError:
        return {}
    except Exception as error:  # what is no number or text where one belongs raises any
        log.warning("%s is damaged (%s), and none of it is kept", path, first_line(error))
        return {}


def earlier_scores(report: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Entries of the earlier report in `folder` that a new one of the same weights should keep.

    They are those of bits/dim if the new report has none, and those of samples if it has none.
    """
    earlier = read_report(folder)
    same = ("data", "num_levels", "padded", "step", "weights_digest")
    if any(earlier.get(name) != report.get(name) for name in same):
        return {}
    kept: dict[str, Any] = {}
    for of_bits, score in ((True, "nll"), (False, "num_samples")):
        if score not in report:
            kept |= {n: value for n, value in earlier.items() if _is_of_bits(n) == of_bits}
    return {name: value for name, value in kept.items() if name not in report}


def write_report(report: dict[str, Any], folder: pathlib.Path) -> None:
    """Write report.json and report.md to `folder`; the report shows the pictures in the folder."""
    title = f"{report['data']}, step {report['step']}" if "step" in report else report["data"]
    text = [f"# {title}", "", table(report), *_table_of_channels(report), ""]
    text += [f"- {remark}" for remark in remarks(report)]
    for name in ("samples", "training"):
        if (folder / f"{name}.png").exists():
            text += ["", f"![{name}]({name}.png)"]
    _write(report, text, folder)


def _with_error(report: dict[str, Any], name: str) -> str:
    """A score of a report with its standard error, as text; empty if it is not there."""
    if report.get(name) is None:
        return ""
    error = report.get(f"{name}_stderr")
    return _shown(report[name]) + ("" if error is None else f" ± {_shown(error)}")


def compared(reports: list[dict[str, Any]]) -> list[list[str]]:
    """The rows of a table with a column for each of several reports, which may be empty."""
    rows = [["step", *(str(report.get("step", "not evaluated")) for report in reports)]]
    for name, *_ in _ROWS:
        cells = [_with_error(report, name) for report in reports]
        rows += [[f"`{name}`", *cells]] if any(cells) else []
    return rows


def write_sweep(reports: list[dict[str, Any]], folder: pathlib.Path) -> dict[str, Any]:
    """Write the report of several checkpoints: a table with a row for each, and a plot.

    Returns:
      A report with `checkpoints`, their reports, and `best`, the best step by each score.
    """
    rows = [row for row in _ROWS if row[3] and all(r.get(row[0]) is not None for r in reports)]
    best: dict[str, int] = {}
    for name, _, _, sign in rows:
        best[name] = min(reports, key=lambda r: sign * r[name])["step"]
    head = ["step", *(f"`{name}`" for name, *_ in rows)]
    text = [f"# {reports[0]['data']}, {len(reports)} checkpoints", ""]
    text += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for report in reports:
        cells = [f"[{report['step']}](step_{report['step']:08}/report.md)"]
        for name, *_ in rows:
            value = _with_error(report, name)
            cells.append(f"**{value}**" if best[name] == report["step"] else value)
        text.append(f"| {' | '.join(cells)} |")
    text += ["", "The best value of each score is bold. Of the last of them:", ""]
    text += [f"- {remark}" for remark in remarks(reports[-1])]
    text += ["", "The scores:", ""]
    text += [f"- `{name}`: {label}{f' [{unit}]' if unit else ''}." for name, label, unit, _ in rows]
    if rows:
        _plot_sweep(reports, [name for name, *_ in rows], folder / "scores.png")
        text += ["", "![scores](scores.png)"]
    sweep = {"data": reports[0]["data"], "checkpoints": reports, "best": best}
    _write(sweep, text, folder)
    return sweep


def _plot_sweep(reports: list[dict[str, Any]], names: list[str], path: pathlib.Path) -> None:
    """Plot each score against the steps, with bars of two standard errors, as a PNG file."""
    from matplotlib.figure import Figure  # not pyplot, which would show it in a notebook

    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    steps = [report["step"] for report in reports]
    for axes, name in zip(grid.flat, names, strict=False):
        errors = [2 * report.get(f"{name}_stderr", 0) for report in reports]
        axes.errorbar(steps, [r[name] for r in reports], yerr=errors, marker=".", capsize=2)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def write_bits(path: pathlib.Path, names: Sequence[str], columns: dict[str, np.ndarray]) -> None:
    """Write a CSV file with a row for each image: its name and the `columns` (N,)."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["image", *columns])
    for name, *row in zip(names, *columns.values(), strict=True):
        table.writerow([name, *(f"{value:.6f}" for value in row)])
    write_text(path, text.getvalue())


def _write(report: dict[str, Any], text: list[str], folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = [*text, "", f"Made with {provenance.made_with()}."]
    write_text(folder / "report.md", "\n".join(text) + "\n")
    write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
