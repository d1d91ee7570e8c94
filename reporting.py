"""What a run shows a person: grids of images, curves and the report."""

import json
import logging
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

log = logging.getLogger("soft_truncation")

# Name in the report, what it says, unit, and 1 if less is better, -1 if more is; 0: a yardstick.
# The order is the table's.
_ROWS = (
    ("nll", "NLL, with residual (a bound on the likelihood)", "bits/dim", 1),
    ("nll_without_residual", "NLL, without residual", "bits/dim", 1),
    ("nelbo", "NELBO, with residual", "bits/dim", 1),
    ("nelbo_without_residual", "NELBO, without residual", "bits/dim", 1),
    ("nelbo_lossless", "NELBO of the levels, with their decoder", "bits/dim", 1),
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
)


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class Progress:
    """A bar, rate and time left of a long part, logged a line at a time."""

    def __init__(self, name: str, total: int, every: float = 5.0) -> None:
        """`total` images are to be done; a line comes every so many seconds, and at the end."""
        self._name, self._total, self._every = name, total, every
        self._done = self._fresh = 0
        self._start = self._last = time.time()

    def advance(self, count: int, note: str = "", fresh: bool = True) -> None:
        """`count` more images are done; not `fresh`: by an earlier run."""
        self._done += count
        self._fresh += count if fresh else 0
        now = time.time()
        if self._done < self._total and now - self._last < self._every:
            return
        self._last = now
        share = self._done / self._total
        bar = "█" * int(16 * share) + "░" * (16 - int(16 * share))
        parts = [self._name, f"{bar} {share:4.0%}", f"{self._done}/{self._total} images"]
        if self._fresh:
            rate = self._fresh / max(now - self._start, 1e-9)
            parts += [f"{rate:.3g} images/s", f"{clock((self._total - self._done) / rate)} left"]
        log.info("%s", " | ".join(parts + ([note] if note else [])))


def image_grid(images: np.ndarray, columns: int = 0) -> np.ndarray:
    """Images (N, H, W, C) uint8 as one, (…, …, C), near-square by default; small ones enlarged."""
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    factor = max(1, 48 // height)
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    gap = 2
    canvas = np.full(
        (rows * (height * factor + gap) + gap, columns * (width * factor + gap) + gap, channels),
        128,
        np.uint8,
    )
    for i, image in enumerate(images):
        top = gap + (i // columns) * (height * factor + gap)
        left = gap + (i % columns) * (width * factor + gap)
        canvas[top : top + height * factor, left : left + width * factor] = image
    return canvas


def save_grid(images: np.ndarray, path: pathlib.Path, columns: int = 0) -> None:
    """Write images as their `image_grid`."""
    canvas = image_grid(images, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas[..., 0] if canvas.shape[-1] == 1 else canvas).save(path)


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def plot_training(metrics: pathlib.Path, path: pathlib.Path) -> None:
    """Draw the losses of a metrics.jsonl over the steps, as PNG."""
    from matplotlib.figure import Figure  # not pyplot: a notebook's figures are its own

    if not metrics.exists():
        return
    rows = read_metrics(metrics)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("loss", "training batches"), ("test_loss", "test images, EMA weights")):
        points = [(r["step"], r[name]) for r in rows if name in r]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=label, marker="." if len(points) < 20 else ""
            )
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="Training")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


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


def _remarks(report: dict[str, Any]) -> Iterator[str]:
    """What the scores are of, a sentence or two each."""
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
        draws, but = report["num_draws"], ", but for the lossless"
        solver = f"rtol {report['rtol']:g}, atol {report['atol']:g}"
        if report["nll_steps"]:
            solver = f"{report['nll_steps']} steps of a fixed size"
        yield (
            f"Bits/dim: {report['num_test_images']} test images of {report['num_levels']} levels, "
            f"uniformly dequantised{but if 'nelbo_lossless' in report else ''}, "
            f"{draws} draw{'s' if draws > 1 else ''} each; {report['nll_nfe']:.0f} score "
            f"evaluations a solve ({solver}), "
            f"{report['nelbo_draws']} times an image for NELBO. "
            f"The standard error is over images{' and draws' if draws > 1 else ''}."
        )
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


def clear(folder: pathlib.Path) -> None:
    """Take an earlier report's pictures away, lest a new one shows them."""
    for name in ("samples", "training", "scores"):
        (folder / f"{name}.png").unlink(missing_ok=True)


def write_report(report: dict[str, Any], folder: pathlib.Path) -> None:
    """Write report.json and report.md into `folder`; pictures are expected beside them."""
    title = f"{report['data']}, step {report['step']}" if "step" in report else report["data"]
    text = [f"# {title}", "", table(report), ""]
    text += [f"- {remark}" for remark in _remarks(report)]
    for name in ("samples", "training"):
        if (folder / f"{name}.png").exists():
            text += ["", f"![{name}]({name}.png)"]
    _write(report, text, folder)


def write_sweep(reports: list[dict[str, Any]], folder: pathlib.Path) -> dict[str, Any]:
    """Write the report of several checkpoints: a row each, the best by each score, curves.

    Returns:
      `checkpoints`, the reports, and `best`: the step by each score.
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
            value = _shown(report[name])
            if report.get(f"{name}_stderr") is not None:
                value += f" ± {_shown(report[f'{name}_stderr'])}"
            cells.append(f"**{value}**" if best[name] == report["step"] else value)
        text.append(f"| {' | '.join(cells)} |")
    text += ["", "The best value of each score is bold. Of the last of them:", ""]
    text += [f"- {remark}" for remark in _remarks(reports[-1])]
    text += ["", "The scores:", ""]
    text += [f"- `{name}`: {label}{f' [{unit}]' if unit else ''}." for name, label, unit, _ in rows]
    if rows:
        _plot_sweep(reports, [name for name, *_ in rows], folder / "scores.png")
        text += ["", "![scores](scores.png)"]
    sweep = {"data": reports[0]["data"], "checkpoints": reports, "best": best}
    _write(sweep, text, folder)
    return sweep


def _plot_sweep(reports: list[dict[str, Any]], names: list[str], path: pathlib.Path) -> None:
    """Draw each score over the steps, with twice its standard error, as PNG."""
    from matplotlib.figure import Figure  # not pyplot: a notebook's figures are its own

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
    figure.savefig(path, dpi=120)


def _write(report: dict[str, Any], text: list[str], folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text("\n".join(text) + "\n")
    partial = folder / "report.json.partial"
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(folder / "report.json")
