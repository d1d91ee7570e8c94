"""Loss and gradient, and their variances, as functions of diffusion time, for trained runs.

    python -m experiments.loss_by_time experiments/digits.py --workdirs runs/digits \
        --out results/digits --only 'vp_(fixed_1e-5|soft_k1)_seed0'

writes OUT/loss_by_time/<run>.json for each run that matches; the runs must have checkpoints. The
losses are those of the newest checkpoint's parameters, not of their EMA, and of test images
unless stated otherwise. No parameters are updated.
"""

import argparse
import itertools
import json
import logging
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

import datasets
import losses
from build import Setup, set_up
from errors import UserError
from experiments.sweep import Run, load_sweep, parse_machine_paths, select
from runtime import checkpointing, environment
from runtime.metrics_log import read_metrics
from runtime.progress import Progress
from runtime.workdir import make_folder
from sde_lib import SDE

log = logging.getLogger("soft_truncation")


def share_of_steps(config: ConfigDict, t: np.ndarray) -> np.ndarray:
    """Share of the training steps that can draw the times `t`, elementwise: P(τ ≤ t)."""
    if config.training.truncation != "soft":
        return np.ones_like(t)
    return np.asarray(losses.get_prior(config).cdf(t))


def density_of_times(config: ConfigDict, sde: SDE, t: np.ndarray, draws: int = 2000) -> np.ndarray:
    """Density of log t for the times of training, by a mean over `draws` truncations.

    Args:
      config: the run's config, with its prior and its distribution of times.
      sde: its SDE.
      t: (N,), below T.
      draws: number of quantiles of the prior, at equal probabilities.
    """
    training = config.training
    tau = np.full(1, training.truncation_time)
    if training.truncation == "soft":
        tau = np.asarray(losses.get_prior(config).icdf((np.arange(draws) + 0.5) / draws))
    if training.importance_sampling:
        rate = np.asarray((sde.diffusion(t) / sde.std(t)) ** 2)
        normalizer = np.asarray(sde.importance_normalizer(tau))
    else:
        rate, normalizer = np.ones_like(t), sde.T - tau
    inside = tau[:, None] <= t
    return t * np.mean(inside * rate / np.where(inside, normalizer[:, None], 1), axis=0)


def _inverse_density(config: ConfigDict, sde: SDE, t: np.ndarray) -> np.ndarray:
    """The factor of λ(t) in training for τ = ε, elementwise."""
    training = config.training
    if training.importance_sampling:
        rate = np.asarray((sde.diffusion(t) / sde.std(t)) ** 2)
        factor = np.asarray(sde.importance_normalizer(training.truncation_time)) / rate
    else:
        factor = np.full_like(t, sde.T - training.truncation_time)
    if training.truncation == "equivalent_weight":
        factor = factor * np.asarray(losses.get_prior(config).cdf(t))
    return factor


class _Gradients:
    """Means and variances of losses and gradients over mini-batches."""

    def __init__(self) -> None:
        self._sum: Any = None
        self._losses: list[float] = []
        self._squares: list[float] = []

    def add(self, loss: Array, grads: Any) -> None:
        self._sum = grads if self._sum is None else jax.tree.map(jnp.add, self._sum, grads)
        self._losses.append(float(loss))
        self._squares.append(float(optax.tree.norm(grads)) ** 2)

    def summary(self) -> dict[str, float]:
        """Unbiased: `grad_variance` is summed over parameters, `grad_norm` is of the mean."""
        count = len(self._squares)
        of_mean = float(optax.tree.norm(self._sum)) ** 2 / count**2
        variance = (np.mean(self._squares) - of_mean) * count / (count - 1)
        return {
            "loss": float(np.mean(self._losses)),
            "loss_variance": float(np.var(self._losses, ddof=1)),
            # Subtract the part of the variance that is in the norm of a mean of few batches.
            "grad_norm": math.sqrt(max(of_mean - float(variance) / count, 0.0)),
            "grad_variance": float(variance),
            "batch_grad_norm": float(np.mean(np.sqrt(self._squares))),
            "batch_grad_norm_variance": float(np.var(np.sqrt(self._squares), ddof=1)),
            "num_batches": count,
        }


def _by_time(
    config: ConfigDict,
    setup: Setup,
    params: Any,
    images: np.ndarray,
    num_times: int,
    num_batches: int,
) -> list[dict[str, Any]]:
    training, sde, size = config.training, setup.sde, config.training.batch_size
    scale = 1 / math.prod(images.shape[1:]) if training.reduce_mean else 1.0

    @jax.jit
    def loss_and_grads(params: Any, key: Array, images: Array, t: Array) -> Any:
        """The objective's integrand on a mini-batch at t, its gradient, and each image's value."""
        data_key, noise_key = jax.random.split(key)
        x0 = setup.preprocessing.to_x0(images, jax.random.split(data_key, size), flip=False)
        z, times = jax.random.normal(noise_key, x0.shape), jnp.full(size, t)
        weight = losses.get_weighting(config)(sde, times)

        def mean_loss(params: Any) -> tuple[Array, Array]:
            score_fn = setup.make_score_fn(params)
            each = losses.score_matching_loss(score_fn, sde, x0, times, z, weight) * scale
            return jnp.mean(each), each

        (loss, each), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        return loss, grads, each

    grid = np.geomspace(training.truncation_time, sde.T, num_times)
    factor = _inverse_density(config, sde, grid)
    share, density = share_of_steps(config, grid), density_of_times(config, sde, grid[:-1])
    progress, rows = Progress("loss by time", num_times * num_batches * size), []
    for i, t in enumerate(grid):
        gradients, values = _Gradients(), []
        for j in range(num_batches):
            batch = images[j * size : (j + 1) * size]
            # The noise is the same at all times, so that curves are smooth.
            loss, grads, each = loss_and_grads(params, losses.step_key(config.seed, j), batch, t)
            gradients.add(loss, grads)
            values.append(np.asarray(each))
            progress.advance(size)
        of_batches = gradients.summary()
        each, c = np.concatenate(values), float(factor[i])
        rows.append(
            {
                "t": float(t),
                "plain_loss": float(each.mean()),
                "plain_loss_variance": float(each.var(ddof=1)),
                "trained_loss": c * float(each.mean()),
                "trained_loss_variance": c**2 * float(each.var(ddof=1)),
                "grad_norm": c * of_batches["grad_norm"],
                "grad_variance": c**2 * of_batches["grad_variance"],
                "share_of_steps": float(share[i]),
                "density_of_log_t": float(density[i]) if i < len(density) else None,
                "num_images": len(each),
                "num_batches": num_batches,
            }
        )
    return rows


def _of_objectives(
    config: ConfigDict,
    setup: Setup,
    params: Any,
    train: datasets.Dataset,
    truncations: tuple[str, ...],
    num_batches: int,
) -> dict[str, dict[str, float]]:
    """Loss and gradient of mini-batches for each truncation, with and without stratified times.

    All are at the same parameters; the names are `soft` and `soft, stratified` and so on.
    """
    size, found = config.training.batch_size, {}
    for truncation, stratified in itertools.product(truncations, (False, True)):
        name = f"{truncation}, stratified" if stratified else truncation
        other = config.copy_and_resolve_references()
        other.training.update(truncation=truncation, stratified_times=stratified)
        objective = losses.get_objective(other, setup.sde)

        @jax.jit
        def grad_fn(params: Any, key: Array, images: Array, objective: Any = objective) -> Any:
            def mean_loss(params: Any) -> Array:
                score_fn, index = setup.make_score_fn(params), jnp.arange(size)
                return jnp.mean(objective(score_fn, key, images, index, train=False)[0])

            return jax.value_and_grad(mean_loss)(params)

        gradients = _Gradients()
        batches = datasets.train_batches(train, size, config.seed)
        for step in range(num_batches):
            key = losses.step_key(config.seed, step)
            gradients.add(*grad_fn(params, key, next(batches)["image"]))
        log.info("objective with %s truncation: %s", name, gradients.summary())
        found[name] = gradients.summary()
    return found


def _of_training(workdir: pathlib.Path) -> dict[str, float]:
    """Mean and variance of the gradient norms logged in the second half of training."""
    rows = [r for r in read_metrics(workdir / "metrics.jsonl") if "grad_norm" in r]
    norms = np.array([row["grad_norm"] for row in rows[len(rows) // 2 :]])
    return {
        "first_step": rows[len(rows) // 2]["step"],
        "num_logged": len(norms),
        "grad_norm": float(norms.mean()),
        "grad_norm_variance": float(norms.var(ddof=1)),
    }


def measure(
    run: Run,
    workdir: pathlib.Path,
    machine_paths: dict[str, str] | None = None,
    num_times: int = 40,
    num_batches: int = 8,
    truncations: tuple[str, ...] = ("fixed", "soft", "equivalent_weight"),
    num_steps: int = 200,
) -> dict[str, Any]:
    """Measure losses and gradients of a trained run.

    Args:
      run: a run of a sweep.
      workdir: the run's workdir, with a checkpoint.
      machine_paths: this machine's paths of data and caches, by field.
      num_times: number of times from ε to T, in geometric progression.
      num_batches: number of mini-batches at each time, fewer if there are too few test images.
      truncations: the truncations to compare, with the run's k and ε.
      num_steps: number of mini-batches for each truncation.

    Returns:
      `by_time`, a row for each time: `plain_loss`, the integrand of the objective, and
      `trained_loss`, the integrand over the density of t at τ = ε, which is what an image adds to
      the loss, with variances over images; `grad_norm` and `grad_variance`, the norm of the mean
      gradient of `trained_loss` and its variance between mini-batches; the share of steps with
      τ ≤ t, and the density of log t.
      `objectives`, loss and gradient of training mini-batches for each truncation, and for it with
      stratified times.
      `training`, statistics of the gradient norms that training logged.

    Raises:
      UserError: there is no checkpoint, or there are too few test images.
    """
    config = run.training_config(machine_paths)
    setup, data = set_up(config), datasets.load_data(config)
    state = checkpointing.restore_latest(config, workdir, setup.state_shape)
    num_batches = min(num_batches, len(data.test) // config.training.batch_size)
    if num_batches < 2:
        raise UserError(
            f"the {len(data.test)} test images are fewer than two batches of "
            f"{config.training.batch_size}: gradients between them can't be compared"
        )
    images = datasets.in_order(data.test, num_batches * config.training.batch_size)["image"]
    images, params = np.random.default_rng(0).permutation(images), jax.device_put(state.params)
    return {
        "run": run.name,
        "point": run.point,
        "seed": run.seed,
        "config_hash": run.config_hash,
        "step": int(state.step),
        "batch_size": config.training.batch_size,
        "training": _of_training(workdir),
        "objectives": _of_objectives(config, setup, params, data.train, truncations, num_steps),
        "by_time": _by_time(config, setup, params, images, num_times, num_batches),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure the runs that the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(prog="experiments.loss_by_time", description=__doc__)
    parser.add_argument("sweep", help="a Python file with get_sweep()")
    parser.add_argument(
        "--workdirs", required=True, type=pathlib.Path, help="the folder of the runs' workdirs"
    )
    parser.add_argument(
        "--out", required=True, type=pathlib.Path, help="results are written to OUT/loss_by_time"
    )
    parser.add_argument(
        "--only", required=True, help="only runs whose names match this regular expression"
    )
    parser.add_argument(
        "--batches", type=int, default=200, help="mini-batches for each kind of truncation"
    )
    parser.add_argument("--set", action="append", default=[], help="as in experiments.run")
    options = parser.parse_args(arguments)
    environment.prepare()
    log.setLevel(logging.INFO)
    try:
        machine_paths = parse_machine_paths(options.set)
        make_folder(options.out / "loss_by_time", "--out")
        for run in select(load_sweep(options.sweep), only=options.only):
            workdir = options.workdirs / run.name
            measured = measure(run, workdir, machine_paths, num_steps=options.batches)
            path = options.out / "loss_by_time" / f"{run.name}.json"
            path.write_text(json.dumps(measured, indent=1) + "\n")
            log.info("%s", path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
