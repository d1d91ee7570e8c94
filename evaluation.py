"""--mode eval and --mode stats: scores of checkpoints or of existing samples.

Partial results are stored in <workdir>/eval/parts until the report is written, so that an
interrupted evaluation can resume. Their names contain a hash of the weights, data and options.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from build import Setup, open_run
from configs.errors import UserError
from data import pixels
from data.batches import Data, Dataset, fingerprint
from data.told_labels import check_labels, sample_labels
from metrics.batched_sampling import get_sampler, sample_batches
from metrics.bits_per_dim import (
    BitsEvaluation,
    advise_on_bits,
    bits_of_images,
    evaluate_baselines,
    evaluate_bits,
    get_bpd_fn,
    network_fields,
    summarize_bits,
    table_of_images,
)
from metrics.distances import (
    frechet_distance,
    inception_score,
    kernel_inception_distance,
    precision_recall,
)
from metrics.given_images import given_images
from metrics.inception import get_inception
from metrics.memory_advice import advise_on_sampling
from metrics.report import (
    channel_moments,
    earlier_scores,
    read_report,
    write_bits,
    write_report,
    write_sweep,
)
from metrics.scorers import (
    Images,
    Scorer,
    cache_dir,
    get_scorers,
    images_of,
    inception_statistics,
    regrouped,
    score_images,
)
from readers.samples import load_images
from runtime import checkpointing, hosts
from runtime.locking import locked
from runtime.pictures import plot_training, save_grid
from runtime.progress import Progress
from runtime.workdir import (
    PartialResults,
    check_network,
    check_processes,
    make_folder,
    short_hash,
)

__all__ = [
    "evaluate",
    "frechet_distance",
    "inception_score",
    "kernel_inception_distance",
    "make_statistics",
    "precision_recall",
]

log = logging.getLogger("soft_truncation")


@dataclasses.dataclass(frozen=True)
class _Run:
    """Objects shared by the evaluations of all checkpoints, so that each function compiles once."""

    setup: Setup
    results: PartialResults
    bits: BitsEvaluation
    sample: Any  # from batched_sampling.get_sampler
    scorers: list[Scorer]

    @property
    def scores_samples(self) -> bool:
        """Whether samples can be scored; for arrays, at least the channels' moments can."""
        of_arrays = self.setup.units.of_arrays and self.setup.evaluation.enable_sampling
        return bool(self.scorers) or of_arrays


def _samples_of_network(run: _Run, params: Any) -> tuple[Images, dict[str, Any]]:
    """Draw samples from a network; returns them and their entries in the report."""
    setup, results = run.setup, run.results
    count, size = setup.evaluation.num_samples, setup.evaluation.samples_a_batch
    digest = short_hash(params, *network_fields(setup), setup.fields["sampling"], size)

    def keep(name: Any, compute: Any) -> Any:
        return results.get(f"{digest}/{name}", compute)

    batches = functools.partial(sample_batches, run.sample, params, setup.seed, count, size, keep)
    progress, evaluations, broken = Progress("sampling", count, compiles=True), [], 0
    for _, part in batches():
        evaluations.append(part.nfe)
        broken += part.num_broken
        note = f"{part.nfe} evaluations"
        progress.advance(len(part.levels), note, fresh=not results.recalled)
    images = Images(count, digest, lambda: (part.levels for _, part in batches()))
    if setup.num_classes:
        labels = sample_labels(setup.sampling.labels, setup.num_classes, 0, count)
        images = dataclasses.replace(images, labels=labels)
    nfe = round(float(np.mean(evaluations)))
    return images, {"num_samples": count, "sampling_nfe": nfe, "num_broken_samples": broken}


def _given_samples(setup: Setup) -> tuple[Images, dict[str, Any]]:
    """The images of `eval.samples`, and their entries in the report."""
    path, num_levels = pathlib.Path(setup.evaluation.samples), setup.num_levels
    if setup.units.of_arrays:
        of_file, _ = setup.read_arrays(path, "eval.samples")
        return images_of(of_file), {"samples": str(path), "num_samples": len(of_file)}
    height, _, channels = setup.shape
    loaded = load_images(path, height, channels, "eval.samples")
    dataset = Dataset(path.stem, loaded.source, 256)
    images = images_of(dataset)

    def batches() -> Iterator[np.ndarray]:
        for grey in images.batches():
            yield np.round(grey * ((num_levels - 1) / 255)).astype(np.uint8)

    report = {"samples": setup.evaluation.samples, "num_samples": len(dataset)}
    return dataclasses.replace(images, batches=batches), report


def _evaluate_samples(run: _Run, images: Images, folder: pathlib.Path) -> dict[str, Any]:
    few = next(regrouped(images.batches(), 64))
    grid = run.setup.units.to_pictures(few)
    hosts.on_main(lambda: save_grid(grid, folder / "samples.png"))
    levels, test = run.setup.num_levels, run.bits.data.test
    report: dict[str, Any] = {}
    for name, kind in (("", images), ("_of_test_images", images_of(test, 10_000))):
        if levels:
            report[f"share_at_ends{name}"] = _share_at_ends(kind.batches(), levels)
        if run.setup.units.of_arrays:
            report[f"channels{name}"] = channel_moments(kind.batches(), run.setup.units.to_files)
    for scorer in run.scorers:
        report |= score_images(scorer, images, run.results)
    return report


def _share_at_ends(batches: Iterator[np.ndarray], num_levels: int) -> float:
    """The share of all batches' values that are the lowest or highest level."""
    shares, counts = [], []
    for batch in batches:
        shares.append(pixels.share_at_ends(batch, num_levels))
        counts.append(len(batch))
    return float(np.average(shares, weights=counts))


def _evaluate_checkpoint(
    run: _Run, workdir: pathlib.Path, step: int, folder: pathlib.Path
) -> dict[str, Any]:
    setup, results = run.setup, run.results
    log.info("evaluating step %d of %s", step, workdir)
    state = checkpointing.restore_step(setup.fields, workdir, setup.state_shape, step)
    params = setup.score_params(state.ema_params)
    before = set(results.used)

    def score() -> dict[str, np.ndarray]:
        report: dict[str, Any] = {
            "step": step,
            "truncation": setup.fields["training"]["truncation"],
        }
        report |= {"weights": "EMA", "weights_digest": short_hash(params)}
        report |= {"expert": setup.expert} if setup.expert else {}
        if setup.evaluation.enable_bpd:
            report |= evaluate_bits(run.bits, params)
        if run.scores_samples:
            images, facts = _samples_of_network(run, params)
            report |= facts | _evaluate_samples(run, images, folder)
        return {"json": np.array(json.dumps(report))}

    # The checkpoint's report is kept until the sweep is complete, so that a resumed sweep skips it;
    # its samples and other parts are deleted now.
    name = short_hash(params, setup.fields, step)
    report = json.loads(str(results.get(f"{name}/report", score)["json"]))
    hosts.on_main(lambda: results.discard(results.used - before - {name}))
    return report


def evaluate(
    config: ConfigDict, workdir: str | os.PathLike[str], expert: str = ""
) -> dict[str, Any]:
    """Score the EMA weights of checkpoints, or given images; writes report.json and report.md.

    The report of one checkpoint is in eval/, that of `eval.samples` in eval/samples_…, and that of
    `eval.images`, with each image's bits/dim, in eval/images_…. If several checkpoints are scored,
    their common report is in eval/, and that of each in eval/step_<step>/. With an `expert`
    (`build.open_run`), the reports are in eval/expert_….

    Returns:
      The report. For several checkpoints it has `checkpoints`, their reports, and `best`, the best
      step by each score.

    Raises:
      UserError: the config, data, weights, statistics or checkpoints can't be used.
    """
    setup, workdir = open_run(config, workdir, expert), pathlib.Path(workdir)
    options = setup.evaluation
    check_processes(setup.fields, {})
    given: tuple[Images, dict[str, Any]] | None = None
    if options.images:
        test = setup.load_data().test if options.images == "test" else None
        chosen, names = given_images(setup, test)
    else:
        data = setup.load_data()
        check_labels(setup.num_classes, setup.classes, data.train)
        given = _given_samples(setup) if options.samples else None
    with contextlib.ExitStack() as stack:
        steps = hosts.on_main(lambda: _take_hold(setup, workdir, stack))
        if options.images:
            return _evaluate_images(setup, workdir, steps, chosen, names)
        return _evaluate(setup, data, workdir, given, steps)


def _steps(setup: Setup, workdir: pathlib.Path) -> list[int]:
    """The steps of the checkpoints to evaluate."""
    options, period = setup.evaluation, setup.loop.snapshot_freq
    return checkpointing.steps_to_evaluate(workdir, options.begin_ckpt, options.end_ckpt, period)


def _take_hold(setup: Setup, workdir: pathlib.Path, stack: contextlib.ExitStack) -> list[int]:
    """Lock eval/, and return the steps of the checkpoints to evaluate."""
    steps = [] if setup.evaluation.samples else _steps(setup, workdir)
    check_network(setup.fields, workdir)
    make_folder(workdir / "eval", "--workdir")
    stack.enter_context(locked(workdir / "eval"))
    read_report(workdir / "eval")  # warns at the start if it is damaged
    return steps


def _check_density(setup: Setup) -> None:
    """Raise a UserError for padded floats, which have no density."""
    if not setup.num_levels and setup.padded_shape != setup.shape:
        raise UserError(
            "padded floats have no bits/dim: their padding has no density; set "
            "--config.eval.enable_bpd=False"
        )


def _evaluate_images(
    setup: Setup,
    workdir: pathlib.Path,
    steps: list[int],
    chosen: Dataset,
    names: Sequence[str],
) -> dict[str, Any]:
    """Write bits/dim of each image of `eval.images` to a folder of its own below eval/."""
    if len(steps) != 1:
        raise UserError(f"eval.images is for one checkpoint; {len(steps)} are chosen")
    _check_density(setup)
    if setup.num_classes and not (chosen.num_classes or setup.label_dropout):
        raise UserError(
            "eval.images have no labels, and the network was never trained without "
            "(training.label_dropout=0)"
        )
    options = setup.evaluation
    options = dataclasses.replace(options, num_test_data=len(names), num_draws=options.image_draws)
    setup = dataclasses.replace(setup, evaluation=options)
    results = PartialResults(workdir / "eval" / "parts")
    scored = Data(chosen, chosen)  # the training images are not needed
    bits = BitsEvaluation(setup, scored, results, get_bpd_fn(setup))
    advise_on_bits(setup, bits.num_test)
    log.info(
        "bits/dim of %d images of %s, %d draws each for its error (eval.image_draws)",
        len(names),
        options.images,
        options.image_draws,
    )
    # Anew, as in `_evaluate`.
    steps = hosts.on_main(lambda: _steps(setup, workdir))
    state = checkpointing.restore_step(setup.fields, workdir, setup.state_shape, steps[0])
    params = setup.score_params(state.ema_params)
    values = bits_of_images(bits, params)
    digest = short_hash(fingerprint(chosen), len(names), params, dataclasses.asdict(options))[:8]
    folder = workdir / "eval" / f"images_{chosen.name}_{digest}"
    report = {
        "data": setup.fields["data"]["dataset"],
        "step": steps[0],
        "images": "test images" if options.images == "test" else options.images,
        "num_levels": setup.num_levels,
        "padded": setup.padded_shape != setup.shape,
        "weights_digest": short_hash(params),
        **summarize_bits(bits, values),
    }

    def write() -> None:
        write_report(report, folder)
        write_bits(folder / "bits_per_dim.csv", names, table_of_images(bits, values))
        _finish(results, folder)

    hosts.on_main(write)
    return report


def _evaluate(
    setup: Setup,
    data: Data,
    workdir: pathlib.Path,
    given: tuple[Images, dict[str, Any]] | None,
    steps: list[int],
) -> dict[str, Any]:
    folder, options = workdir / "eval", setup.evaluation
    results = PartialResults(folder / "parts")
    scorers = get_scorers(setup, data) if options.enable_sampling else []
    bits = BitsEvaluation(setup, data, results, get_bpd_fn(setup))
    sample = get_sampler(setup, options.samples_a_batch)
    run = _Run(setup, results, bits, sample, scorers)
    none = options.enable_sampling and not run.scores_samples
    if none and options.enable_bpd and not given:
        log.warning(
            "nothing can score samples of %s, so none are drawn; --mode sample draws and keeps "
            "them",
            data.train.name,
        )
    if not run.scores_samples and (given or not options.enable_bpd):
        raise UserError("nothing would be scored; see the lines above, and the eval.enable_ fields")
    if run.scores_samples and not given:
        advise_on_sampling(setup, "eval.sampling_batch_size", options.samples_a_batch)
    if options.enable_bpd and not given:
        _check_density(setup)
        advise_on_bits(setup, bits.num_test)
    if options.enable_bpd and not given and bits.num_test < 2:
        raise UserError(f"{data.test.name} has one test image; a standard error needs 2 or more")
    about: dict[str, Any] = {"data": data.train.name, "num_levels": setup.num_levels}
    about["data_notes"] = list(data.train.notes)
    about["padded"] = setup.padded_shape != setup.shape
    if given:
        images, facts = given
        name = pathlib.Path(options.samples).resolve().name
        folder /= f"samples_{name}_{images.digest[:8]}"
        log.info("evaluating %d images of %s", images.count, options.samples)
        report = about | facts | _evaluate_samples(run, images, folder)
        hosts.on_main(functools.partial(write_report, report, folder))
    else:
        if options.enable_bpd and not setup.expert:
            about |= evaluate_baselines(run.bits)
        # Anew, since a training may have deleted the newest checkpoint in the meantime.
        steps = hosts.on_main(lambda: _steps(setup, workdir))
        report = _evaluate_steps(run, workdir, steps, about)
    hosts.on_main(lambda: _finish(results, folder))
    return report


def _evaluate_steps(
    run: _Run, workdir: pathlib.Path, steps: list[int], about: dict[str, Any]
) -> dict[str, Any]:
    """Write a report for each step, and a common one for several; returns the last one written."""
    reports, folder = [], workdir / "eval"
    if run.setup.expert:
        folder /= f"expert_{short_hash(run.setup.expert)[:8]}"
    for step in steps:
        of_step = folder / f"step_{step:08}" if len(steps) > 1 else folder
        try:
            report = about | _evaluate_checkpoint(run, workdir, step, of_step)
        except UserError as error:
            if len(steps) == 1:
                raise
            log.warning("step %d is left out: %s", step, error)
            continue
        write = functools.partial(_write_report, report, of_step, workdir / "metrics.jsonl")
        reports.append(hosts.on_main(write))
    if not reports:
        raise UserError("no checkpoint could be scored; the lines above say why")
    if len(steps) > 1:
        return hosts.on_main(lambda: write_sweep(reports, folder))
    return reports[0]


def _write_report(
    report: dict[str, Any], folder: pathlib.Path, metrics: pathlib.Path
) -> dict[str, Any]:
    """Write a checkpoint's report, and keep scores that only an earlier report has; returns it."""
    kept = earlier_scores(report, folder)
    if kept:
        what = "scores of samples" if "num_samples" in kept else "bits/dim"
        log.info("the report keeps the %s of an earlier evaluation of these weights", what)
    report |= kept
    stale = ["training", "scores"] + ["samples"] * ("num_samples" not in report)
    for name in stale:
        (folder / f"{name}.png").unlink(missing_ok=True)
    plot_training(metrics, folder / "training.png")
    write_report(report, folder)
    return report


def _finish(results: PartialResults, folder: pathlib.Path) -> None:
    """Delete the partial results, and log the report's table."""
    results.discard(results.used)
    for line in (folder / "report.md").read_text().splitlines():
        if line.startswith("|"):
            log.info("%s", line)
    log.info("report in %s", folder / "report.md")


def make_statistics(setup: Setup) -> pathlib.Path:
    """Compute the statistics of the training images, for FID.

    Returns:
      The path of their file: `eval.stats_path`, or a file in the cache.

    Raises:
      UserError: there are no Inception weights, or the file has statistics of something else.
    """
    train = setup.load_data().train
    options = setup.evaluation
    extractor = get_inception(options.inception_path, cache_dir(options), train.num_levels)
    if not extractor:
        raise UserError("no Inception weights, hence no statistics; the line above says more")
    statistics, path = inception_statistics(setup, extractor, train, make=True)
    log.info("%s: %s", path, statistics.facts)
    return path
