"""Kill a training run many times; its result must equal an uninterrupted run's, bit for bit.

python -m benchmarks.kill_training --kills 30

Trains a small network on digits twice: once without interruption, and once killed by SIGKILL at
random times, every second time while a checkpoint is being written. Prints a line for each kill
and, at the end, whether parameters, EMA, optimiser state and losses are identical.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 1200


def start(workdir: pathlib.Path) -> subprocess.Popen:
    """Start or resume the run; the command is the same for both."""
    command = [sys.executable, str(ROOT / "main.py"), f"--config={ROOT}/configs/vp/digits_st.py"]
    command += [f"--workdir={workdir}", f"--config.training.n_iters={STEPS}"]
    command += ["--config.model.nf=8", "--config.model.ch_mult=(1,)"]
    command += ["--config.model.attn_resolutions=()", "--config.training.batch_size=8"]
    command += ["--config.training.log_freq=1", "--config.training.eval_freq=100000"]
    command += ["--config.training.snapshot_freq=50", "--config.training.snapshot_sampling=False"]
    command += ["--config.training.snapshot_freq_for_preemption=5"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "jax_cache")}
    with log_of(workdir).open("w") as file:
        return subprocess.Popen(command, env=os.environ | cache, stderr=file)


def log_of(workdir: pathlib.Path) -> pathlib.Path:
    """The path of the log of a run's last process."""
    return workdir.with_suffix(".log")


def last_step(workdir: pathlib.Path) -> int:
    """The last step in metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(row)["step"] for row in rows[:-1]), default=0)


def wait_for_kill(workdir: pathlib.Path, process: subprocess.Popen, amid_save: bool) -> str:
    """Wait until a random time after the first new step, or until a checkpoint is being written."""
    before = last_step(workdir)
    while last_step(workdir) <= before and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.6))
    while amid_save and process.poll() is None:
        if any("tmp" in path.name for path in (workdir / "checkpoints").iterdir()):
            return "while saving"
    return "at a random time"


def state_of(workdir: pathlib.Path) -> list[np.ndarray]:
    """All arrays of the last checkpoint."""
    path = workdir / "checkpoints" / str(STEPS) / "default"
    return [np.asarray(x) for x in jax.tree.leaves(ocp.StandardCheckpointer().restore(path))]


def main() -> None:
    """Train both runs, and compare their results; the exit status is 0 if they are identical."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    kills = parser.parse_args().kills
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = pathlib.Path(folder) / "whole", pathlib.Path(folder) / "cut"
        if start(whole).wait():
            sys.exit("the undisturbed run failed")
        for kill in range(1, kills + 1):
            process = start(cut)
            moment = wait_for_kill(cut, process, amid_save=kill % 2 == 0)
            if process.poll() is not None:
                sys.exit(f"the run ended before kill {kill}: {log_of(cut).read_text()[-300:]}")
            process.send_signal(signal.SIGKILL)
            process.wait()
            said = log_of(cut).read_text().splitlines()
            begun = [line.split(" ", 1)[1] for line in said if "resumed" in line]
            unfinished = sum("tmp" in p.name for p in (cut / "checkpoints").iterdir())
            print(
                f"kill {kill}/{kills} {moment} at step {last_step(cut)} | {''.join(begun) or 'new'}"
                f" | {unfinished} unfinished saves left",
                flush=True,
            )
        if start(cut).wait():
            sys.exit(f"the last run failed: {log_of(cut).read_text()[-300:]}")
        pairs = list(zip(state_of(whole), state_of(cut), strict=True))
        same = all(np.array_equal(a, b) for a, b in pairs)
        logs = [(path / "metrics.jsonl").read_text().splitlines() for path in (whole, cut)]
        losses = [
            [(r["step"], r["loss"]) for r in map(json.loads, log) if "loss" in r] for log in logs
        ]
        print(f"{len(pairs)} arrays of the final state identical: {same}")
        print(f"{len(losses[0])} losses identical: {losses[0] == losses[1]}")
        sys.exit(not (same and losses[0] == losses[1]))


if __name__ == "__main__":
    main()
