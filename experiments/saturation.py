"""Why samples of a short training saturate: the denoised image's error by time, and samplers.

    python -m experiments.saturation RUN…     # workdirs of trained runs

For each run, of test images and their noise: the error of the denoised image D(x_t, t), the share
of its values that lie outside the data's range; then the share of samples' values at the ends of
the range by sampler, with the EMA's weights and with the last ones.
"""

import argparse
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

import datasets
import losses
from batched_sampling import get_sampler
from build import set_up
from configs import saved
from runtime import checkpointing, environment
from sampling import denoise

TIMES = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.03, 0.01)
SAMPLERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("DPM-Solver++, 20 steps", {"method": "dpm_solver", "num_steps": 20}),
    ("Heun, 18 steps", {"method": "heun", "num_steps": 18}),
    ("PC, 200 steps", {"method": "pc"}),
)


def main() -> None:
    """Print the tables of each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("workdirs", type=pathlib.Path, nargs="+")
    parser.add_argument("--samples", type=int, default=128)
    flags = parser.parse_args()
    environment.prepare()
    logging.getLogger("soft_truncation").setLevel(logging.WARNING)
    for workdir in flags.workdirs:
        config = saved.get_config(workdir)
        config.model.num_scales = 200
        setup, data = set_up(config), datasets.load_data(config)
        state = checkpointing.restore_latest(config, workdir, setup.state_shape)
        images = datasets.in_order(data.test, 256)["image"]
        x0 = jnp.asarray(setup.preprocessing.to_x0_without_noise(images))
        z = jax.random.normal(jax.random.key(0), x0.shape)
        score_fn = jax.jit(lambda x, t: setup.make_score_fn(state.ema_params)(x, t))  # noqa: B023
        print(f"\n{workdir.name}\n\n| t | σ/α | rms error of ε̂ | of D | D outside the range |")
        print("|---" * 5 + "|")
        for time in TIMES:
            t = jnp.full(len(x0), time)
            x_t = losses.perturb(setup.sde, x0, t, z)
            d = denoise(setup.sde, score_fn, x_t, t)
            ratio = float(jnp.exp(0.5 * setup.sde.gamma(time)))
            error = float(jnp.sqrt(jnp.mean((d - x0) ** 2)))
            low = -1 if config.data.centered else 0
            outside = float(jnp.mean((d < low) | (d > 1)))
            print(f"| {time:g} | {ratio:.3g} | {error / ratio:.3g} | {error:.3g} | {outside:.1%} |")
        test = datasets.share_at_ends(images, setup.num_levels)
        print(f"\nValues at the ends of the range; of test images {test:.1%}:\n")
        print("| sampler | EMA | last weights |\n|---|---|---|")
        for name, fields in SAMPLERS:
            config.sampling.update(fields)
            sample = get_sampler(setup, flags.samples)
            shares = [
                datasets.share_at_ends(sample(p, jax.random.key(1)).levels, setup.num_levels)
                for p in (state.ema_params, state.params)
            ]
            print(f"| {name} | {shares[0]:.1%} | {shares[1]:.1%} |", flush=True)


if __name__ == "__main__":
    main()
