"""16×16 crops of photographs: parametrisations against priors, for a CPU.

    python -m experiments.photographs DIR PHOTOGRAPHS…       # makes the crops; folders or files
    python -m experiments.run experiments/photographs.py --set data.path=DIR --out … --workdirs …

The photographs are those of Debian's packages mate-backgrounds (in nature), lomiri-wallpapers-16.04
and lomiri-wallpapers-20.04, below /usr/share/backgrounds. Every fifth one is for testing alone. A
network has about 0.3 M parameters and trains for 2,000 steps.
"""

import argparse
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from configs.vp import folder_st
from experiments.sweep import Sweep

SIZE = 16


def get_sweep() -> Sweep:
    """The sweep: noise or velocity, times fixed truncation, soft truncation and the sigmoid."""
    config = folder_st.get_config()
    config.data.update(image_size=SIZE)
    config.model.update(
        nf=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(8,), dropout=0.0, ema_rate=0.995
    )
    config.optim.update(lr=2e-3, warmup=100)
    config.training.update(
        truncation="soft",
        stratified_times=False,
        batch_size=32,
        n_iters=2000,
        log_freq=50,
        eval_freq=500,
        snapshot_freq=2000,
        snapshot_freq_for_preemption=500,
        snapshot_sampling=False,
    )
    config.sampling.update(method="dpm_solver", num_steps=20, truncation_time=1e-3)
    config.eval.update(
        enable_fid=False,
        batch_size=128,
        num_test_data=384,
        nll_steps=32,
        nelbo_draws=16,
    )
    priors: dict[str, dict[str, Any]] = {
        "fixed": {"training.truncation": "fixed"},
        "soft_k1": {"training.truncation": "soft", "training.k": 1.0},
        "sigmoid": {"training.truncation": "soft", "training.prior": "sigmoid"},
    }
    points: dict[str, dict[str, Any]] = {
        f"{parametrization}_{name}": {"model.parametrization": parametrization, **prior}
        for parametrization in ("noise", "velocity")
        for name, prior in priors.items()
    }
    # Trained on the levels themselves, for the bounds of their probability.
    points["velocity_fixed_levels"] = {
        **points["velocity_fixed"],
        "data.dequantization": "lossless",
        "eval.truncated_normal": True,
        "eval.num_draws": 10,
        "eval.num_test_data": 64,
    }
    points["rve_velocity_levels"] = {
        "data.dequantization": "lossless",
        "data.centered": False,
        "training.sde": "reciprocal_vesde",
        "training.truncation": "fixed",
        "model.parametrization": "velocity",
        "model.sigma_data": 0.5,
        "model.sigma_max": 14.0,  # about the largest distance of two crops (arXiv 2006.09011)
        "sampling.truncation_time": 1e-5,
        "training.n_iters": 600,
        "eval.truncated_normal": True,
        "eval.num_test_data": 64,
    }
    return Sweep("photographs", config, points, seeds=(0,))


def make_crops(
    out: pathlib.Path, photographs: list[pathlib.Path], train: int = 12_000, test: int = 2000
) -> None:
    """Write random crops of photographs, which are first scaled to 320 pixels on the shorter side.

    Args:
      out: gets the folders train and test.
      photographs: image files; every fifth is for testing.
      train, test: the numbers of crops.
    """
    rng = np.random.default_rng(0)
    for split, chosen, count in (
        ("train", [p for i, p in enumerate(photographs) if i % 5 != 4], train),
        ("test", photographs[4::5], test),
    ):
        folder = out / split
        folder.mkdir(parents=True, exist_ok=True)
        each = -(-count // len(chosen))
        for number, path in enumerate(chosen):
            with Image.open(path) as image:
                scale = 320 / min(image.size)
                small = image.convert("RGB").resize(
                    (round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX
                )
            pixels = np.asarray(small)
            for crop in range(min(each, count - number * each)):
                top, left = (rng.integers(length - SIZE + 1) for length in pixels.shape[:2])
                part = pixels[top : top + SIZE, left : left + SIZE]
                Image.fromarray(part).save(folder / f"{number:03}_{crop:05}.png")
        print(f"{split}: {count} crops of {len(chosen)} photographs in {folder}")


def main() -> None:
    """Make the crops."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("photographs", type=pathlib.Path, nargs="+")
    flags = parser.parse_args()
    paths: list[pathlib.Path] = []
    for given in flags.photographs:
        found = [given] if given.is_file() else sorted(given.rglob("*.jpg"))
        paths += [path for path in found if not path.is_symlink()]
    make_crops(flags.out, paths)


if __name__ == "__main__":
    main()
