"""Trainings of several processes, of which one is lost, or whose number changes.

    python -m benchmarks.processes --lose 2 3
    python -m benchmarks.processes --change 2:1 1:3 3:2

Over loopback. Of so many processes one is sent a signal at a random time: the table has in how many
seconds the others had ended, with which status, and their last line; then the same commands must go
on. Or a run goes on with another number of processes, and is compared with one of one process.
"""

import argparse
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from runtime.metrics_log import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _start(workdir: pathlib.Path, count: int, steps: int) -> list[subprocess.Popen[str]]:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, str(ROOT / "main.py"), f"--config={ROOT}/configs/vp/digits_st.py"]
    command += [f"--workdir={workdir}", f"--config.training.n_iters={steps}"]
    command += ["--config.model.nf=8", "--config.model.ch_mult=(1,)"]
    command += ["--config.model.attn_resolutions=()", "--config.training.batch_size=6"]
    command += ["--config.training.log_freq=1", "--config.training.eval_freq=1000000"]
    command += ["--config.training.snapshot_freq=1000000"]
    command += ["--config.training.snapshot_freq_for_preemption=20"]
    command += ["--config.training.snapshot_sampling=False"]
    command += [f"--num_processes={count}", f"--coordinator_address=127.0.0.1:{port}"]
    return [
        subprocess.Popen([*command, f"--process_id={i}"], stderr=subprocess.PIPE, text=True)
        for i in range(count)
    ]


def _last_step(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return rows[-1]["step"] if rows else 0


def _finish(workdir: pathlib.Path, count: int, steps: int) -> list[str]:
    """Train up to a step; what the processes said."""
    processes = _start(workdir, count, steps)
    said = [process.communicate(timeout=600)[1] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"{count} processes failed: {said[0][-1000:]}")
    return said


def _lose(counts: list[int]) -> int:
    """Send all signals to the first and to the last process; the number of cases not well."""
    draw, bad = random.Random(0), 0
    print("| processes | signal | to | ended after, s | status | last line of another |")
    print("|---|---|---|---|---|---|")
    for count in counts:
        for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
            for victim in (0, count - 1):
                with tempfile.TemporaryDirectory() as name:
                    workdir = pathlib.Path(name) / "run"
                    processes = _start(workdir, count, 10**6)
                    while _last_step(workdir) < 45:
                        time.sleep(0.05)
                        if any(p.poll() is not None for p in processes):
                            sys.exit("a process ended by itself")
                    time.sleep(draw.random())
                    began = time.monotonic()
                    processes[victim].send_signal(number)
                    others = [p for i, p in enumerate(processes) if i != victim]
                    said = [p.communicate(timeout=90)[1] for p in others]
                    seconds = time.monotonic() - began
                    processes[victim].kill()
                    processes[victim].communicate()
                    codes = [p.returncode for p in others]
                    line = (said[0].strip().splitlines() or [""])[-1].replace(str(workdir), "RUN")
                    wanted = 0 if number == signal.SIGTERM else 1
                    limit = 45 if number == signal.SIGSTOP else 20
                    well = codes == [wanted] * len(others) and seconds < limit
                    well = well and "Traceback" not in "".join(said)
                    rest = _finish(workdir, count, _last_step(workdir) + 5)
                    well = well and "resumed" in rest[0]
                    bad += not well
                    print(
                        f"| {count} | {number.name} | {victim} | {seconds:.1f} | {codes} | "
                        f"{line}{'' if well else ' **WRONG**'} |",
                        flush=True,
                    )
    return bad


def _change(changes: list[str]) -> None:
    """Train 20 steps with one number of processes and 20 with another."""
    with tempfile.TemporaryDirectory() as name:
        one = pathlib.Path(name) / "one"
        _finish(one, 1, 40)
        print(
            "| processes | largest difference of a loss, relative | of a parameter |\n|---|---|---|"
        )
        for change in changes:
            workdir = pathlib.Path(name) / change.replace(":", "_")
            for count, steps in zip(map(int, change.split(":")), (20, 40), strict=True):
                _finish(workdir, count, steps)
            of_losses = max(
                abs(a - b) / abs(b) for a, b in zip(_losses(workdir), _losses(one), strict=True)
            )
            of_params = max(
                float(np.abs(a - b).max())
                for a, b in zip(_params(workdir), _params(one), strict=True)
            )
            print(
                f"| {change.replace(':', ' → ')} | {of_losses:.1e} | {of_params:.1e} |", flush=True
            )


def _losses(workdir: pathlib.Path) -> list[float]:
    return [row["loss"] for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row]


def _params(workdir: pathlib.Path) -> list[np.ndarray]:
    state = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / "40" / "default")
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state["params"])]


def main() -> None:
    """Try what the command line asks for; exits with 0 if all was well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--lose", type=int, nargs="+", default=[], help="numbers of processes")
    parser.add_argument("--change", nargs="+", default=[], help="before:after")
    options = parser.parse_args()
    if options.change:
        _change(options.change)
    sys.exit(bool(_lose(options.lose)) if options.lose else 0)


if __name__ == "__main__":
    main()
