"""Starts main.py in processes of their own, and watches them: for tests and for stress tests."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np

import build
from runtime import checkpointing
from runtime.metrics_log import read_metrics
from tests.helpers import environment_of

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAIN, DIGITS = (str(ROOT / "main.py"),), "vp/digits_st.py"
# main.py with a small network.
SMALL_MAIN = (
    "-c",
    """
from absl import app
import main
from tests.helpers import small_networks
with small_networks():
    app.run(main.main, flags_parser=main._parse)
""",
)
# A network that compiles in seconds, logged at each step; nothing else interrupts the training.
TINY = (
    "--config.model.nf=8",
    "--config.model.ch_mult=(1,)",
    "--config.model.attn_resolutions=()",
    "--config.training.batch_size=8",
    "--config.training.log_freq=1",
    "--config.training.eval_freq=1000",
    "--config.training.snapshot_freq=1000",
    "--config.training.snapshot_sampling=False",
)


def command(config, *args, program=MAIN):
    """The command that runs a program, which is main.py, with a recipe."""
    return [sys.executable, *program, f"--config={ROOT}/configs/{config}", *args]


def run_main(config, *args, cwd=ROOT, devices=1):
    """Run main.py to its end."""
    return subprocess.run(
        command(config, *args),
        cwd=cwd,
        env=environment_of(devices),
        capture_output=True,
        text=True,
        check=False,
    )


def start(config, *args, devices=1, program=MAIN, **options):
    """Start main.py; its log is a pipe, unless `options` of Popen say otherwise."""
    options = {"env": environment_of(devices), "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(command(config, *args, program=program), cwd=ROOT, **options)


def start_several(
    count, *args, program=MAIN, devices=1, host="127.0.0.1", prefixes=None, **options
):
    """Start a run of digits in several processes, each after the words of its prefix."""
    shared = [f"--num_processes={count}", f"--coordinator_address={host}:{free_port()}"]
    options = {"env": environment_of(devices), "stderr": subprocess.PIPE, "text": True, **options}
    started = []
    for i, prefix in enumerate(prefixes or [[]] * count):
        own = [*shared, f"--process_id={i}"] if count > 1 else []
        words = [*prefix, *command(DIGITS, *args, *own, program=program)]
        started.append(subprocess.Popen(words, cwd=ROOT, **options))
    return started


def free_port():
    """A port that nobody listens at."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def wait_until(reached, *processes, every=0.005):
    """Wait for what the processes are to do; none of them may end before."""
    while not reached():
        for process in processes:
            assert process.poll() is None, f"the run ended with {process.returncode} before it"
        time.sleep(every)


def kill(*processes):
    """Kill processes that may have ended already."""
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()


def last_line(said):
    """The last line of what a process said."""
    return (said.strip().splitlines() or [""])[-1]


def losses_of(workdir):
    """{step: loss} of a run's metrics."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def last_step(workdir):
    """The last step that a run at work has logged; 0 before the first."""
    return max((row["step"] for row in read_metrics(workdir / "metrics.jsonl")), default=0)


def state_of(config, workdir):
    """The state of a run's newest checkpoint."""
    return checkpointing.restore_latest(config, workdir, build.set_up(config).state_shape)


def assert_identical(a, b):
    """Two trees of arrays are equal, bit for bit."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def steps_of(workdir):
    """The steps of a run's checkpoints."""
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())
