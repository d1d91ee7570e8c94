"""What a run shows a person: grids of images, curves and the report."""

import json
import pathlib
from typing import Any

import numpy as np
from PIL import Image

# Name in the report, what it says, unit. The order is the table's.
_ROWS = (
    ("nll", "NLL, with residual (a bound on the likelihood)", "bits/dim"),
    ("nll_without_residual", "NLL, without residual", "bits/dim"),
    ("nelbo", "NELBO, with residual", "bits/dim"),
    ("nelbo_without_residual", "NELBO, without residual", "bits/dim"),
    ("nelbo_lossless", "NELBO of the levels, with their decoder", "bits/dim"),
    ("nll_untrained_network", "NLL of the untrained network", "bits/dim"),
    ("nll_gaussian", "NLL of a Gaussian fitted to the training images", "bits/dim"),
    ("fd_classifier", "Fréchet distance, samples to training images (not FID)", ""),
    ("fd_classifier_of_test_images", "the same of real test images, for scale", ""),
    ("kid_classifier", "kernel distance (not KID on Inception)", ""),
    ("precision_classifier", "precision, on classifier features", ""),
    ("recall_classifier", "recall, on classifier features", ""),
)


def save_grid(images: np.ndarray, path: pathlib.Path, columns: int = 0) -> None:
    """Write images (N, H, W, C) uint8 as a grid, near-square by default; small ones enlarged."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas[..., 0] if channels == 1 else canvas).save(path)


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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not metrics.exists():
        return
    rows = read_metrics(metrics)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
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
    plt.close(figure)


def table(report: dict[str, Any]) -> str:
    """The scores of a report as a Markdown table."""
    lines = ["| score | value | standard error | unit |", "|---|---|---|---|"]
    for name, label, unit in _ROWS:
        if report.get(name) is not None:
            error = report.get(f"{name}_stderr")
            shown = "" if error is None else f"{error:.4f}"
            lines.append(f"| `{name}`: {label} | {report[name]:.4f} | {shown} | {unit} |")
    return "\n".join(lines)


def write_report(report: dict[str, Any], folder: pathlib.Path) -> None:
    """Write report.json and report.md into `folder`; pictures are expected beside them."""
    text = [f"# {report['data']}, step {report['step']}", "", table(report), ""]
    for name, label in (("untrained_network", "the untrained network"), ("gaussian", "a Gaussian")):
        if report.get(f"nll_{name}") is not None:
            gain = report[f"nll_{name}"] - report["nll"]
            verb = "beats" if gain > 0 else "does NOT beat"
            text.append(
                f"- Training {verb} {label} by {abs(gain):.3f} bits/dim on the test images "
                "(NLL with residual)."
            )
    if "nll" in report:
        text.append(
            f"- Bits/dim: {report['num_test_images']} test images of {report['num_levels']} "
            f"levels, uniformly dequantised; {report['nll_nfe']:.0f} score evaluations a solve. "
            "The standard error is over images."
        )
    if "num_samples" in report:
        text.append(
            f"- Samples: {report['num_samples']}, {report['sampling_nfe']} score evaluations each."
        )
    if "fd_classifier" in report:
        text.append(
            "- Features: 64 units of a classifier trained on the labels "
            f"(test accuracy {report['classifier_accuracy']:.3f}, weights "
            f"{report['classifier_weights']})."
        )
    for name in ("samples", "training"):
        if (folder / f"{name}.png").exists():
            text += ["", f"![{name}]({name}.png)"]
    (folder / "report.md").write_text("\n".join(text) + "\n")
    partial = folder / "report.json.partial"
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(folder / "report.json")
