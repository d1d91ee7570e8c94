"""Compare training in bfloat16 with training in float32.

python -m benchmarks.precision                             # digits, 500 steps
python -m benchmarks.precision --config configs/vp/fashion_mnist_st.py --steps 2000 --nll

The two runs of `--mode train` differ only in `model.dtype`; images, times and noise of every step
are the same. On a GPU float32 means TF32, unless JAX_DEFAULT_MATMUL_PRECISION=float32 is set.
"""

import argparse
import logging
import pathlib
import runpy
import tempfile

import jax
import numpy as np

import run_lib
from runtime import environment
from runtime.metrics_log import read_metrics

DTYPES = ("float32", "bfloat16")


def main() -> None:
    """Train both networks, and print a table of their losses."""
    environment.prepare()
    logging.getLogger("soft_truncation").setLevel(logging.INFO)  # show the runs' progress
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--config", default="configs/vp/digits_st.py")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--windows", type=int, default=5, help="number of rows of the table")
    parser.add_argument("--nll", action="store_true", help="also compute bits/dim of each run")
    flags = parser.parse_args()
    losses, lines = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            config = runpy.run_path(flags.config)["get_config"]()
            config.model.dtype = dtype
            config.training.update(
                n_iters=flags.steps,
                log_freq=1,
                eval_freq=flags.steps,
                snapshot_freq=flags.steps,
                snapshot_freq_for_preemption=flags.steps,
                snapshot_sampling=False,
            )
            config.eval.enable_sampling = False
            workdir = pathlib.Path(folder) / dtype
            run_lib.train(config, workdir)
            rows = read_metrics(workdir / "metrics.jsonl")
            losses[dtype] = np.array([row["loss"] for row in rows if "loss" in row])
            if flags.nll:
                report = run_lib.evaluate(config, workdir)
                cells = report["nll"], report["nll_stderr"], report["num_test_images"]
                lines.append("{}: NLL {:.4f} ± {:.4f} bits/dim on {} images".format(dtype, *cells))
    print(f"\nJAX {jax.__version__}, {jax.devices()}, {flags.config}")
    print("| steps | loss, float32 | loss, bfloat16 | mean difference | standard error |")
    print("|---" * 5 + "|")
    for steps in np.array_split(np.arange(len(losses["float32"])), flags.windows):
        first, second = (losses[dtype][steps] for dtype in DTYPES)
        change = second - first
        error = change.std(ddof=1) / len(steps) ** 0.5
        numbers = " | ".join(
            f"{x:.4g}" for x in (first.mean(), second.mean(), change.mean(), error)
        )
        print(f"| {steps[0] + 1} to {steps[-1] + 1} | {numbers} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
