"""Trainings of several processes, of which one is lost, or whose number changes.

    python -m tests.stress.processes --lose 2 3
    python -m tests.stress.processes --change 2:1 1:3 3:2
    python -m tests.stress.processes --cable                 # as root, on Linux

Over loopback. Of so many processes one is sent a signal at a random time: the table has in how many
seconds the others had ended, with which status, and their last line; then the same commands must go
on. Or a run goes on with another number of processes, and is compared with one of one process. Or
two processes are in network namespaces of their own, and the cable between them is pulled.
"""

import argparse
import contextlib
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

from benchmarks.measure import Table
from tests.jobs import (
    TINY,
    kill,
    last_line,
    last_step,
    losses_of,
    start_several,
    steps_of,
    wait_until,
)

FIELDS = (
    *TINY,
    "--config.training.batch_size=6",
    "--config.training.eval_freq=1000000",
    "--config.training.snapshot_freq=1000000",
    "--config.training.snapshot_freq_for_preemption=20",
)
# status (of SIGABRT where JAX ends a process), and after how many seconds at the latest
EXPECTED = {signal.SIGKILL: (6, 30), signal.SIGSTOP: (6, 30), signal.SIGTERM: (0, 20)}
NAMESPACES, HOST = ("stress_a", "stress_b"), "10.9.0.1"


def start(workdir, count, steps, **options):
    args = (*FIELDS, f"--workdir={workdir}", f"--config.training.n_iters={steps}")
    return start_several(count, *args, **options)


def finish(workdir, count, steps):
    """Train up to a step; what the processes said."""
    processes = start(workdir, count, steps)
    said = [process.communicate(timeout=600)[1] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"{count} processes failed: {said[0][-1000:]}")
    return said


def at_work(workdir, processes):
    """Wait until a run has made two checkpoints."""
    folder = workdir / "checkpoints"
    wait_until(lambda: folder.exists() and 40 in steps_of(workdir), *processes, every=0.05)


def ended(processes, began, workdir):
    """(seconds until the last of them ended, their statuses, the first one's last line)."""
    said = [process.communicate(timeout=90)[1] for process in processes]
    seconds, line = time.monotonic() - began, last_line(said[0]).replace(str(workdir), "RUN")
    assert "Traceback" not in "".join(said), said
    return seconds, [process.returncode for process in processes], line


def lose_one(count, number, victim, draw):
    """Send a signal to one of so many processes; returns (a row, whether all was well)."""
    with tempfile.TemporaryDirectory() as name:
        workdir = pathlib.Path(name) / "run"
        processes = start(workdir, count, 10**6)
        at_work(workdir, processes)
        time.sleep(draw.random())
        began, others = time.monotonic(), [p for i, p in enumerate(processes) if i != victim]
        processes[victim].send_signal(number)
        seconds, codes, line = ended(others, began, workdir)
        kill(processes[victim])
        status, limit = EXPECTED[number]
        rest = finish(workdir, count, last_step(workdir) + 5)
    well = codes == [status] * len(others) and seconds < limit and "resumed" in rest[0]
    return (count, number.name, victim, seconds, codes, line), well


def lose(counts):
    """Send all signals to the first and to the last process; whether all was well."""
    draw, all_well = random.Random(0), True
    table = Table("processes", "signal", "to", "ended after, s", "status", "last line of another")
    for count in counts:
        for number in EXPECTED:
            for victim in (0, count - 1):
                (*row, line), well = lose_one(count, number, victim, draw)
                table.add(*row, line + ("" if well else " **WRONG**"))
                all_well &= well
    table.show()
    return all_well


def change(changes):
    """Train 20 steps with one number of processes and 20 with another."""
    table = Table("processes", "largest difference of a loss, relative", "of a parameter")
    with tempfile.TemporaryDirectory() as name:
        one = pathlib.Path(name) / "one"
        finish(one, 1, 40)
        for text in changes:
            workdir = pathlib.Path(name) / text.replace(":", "_")
            for count, steps in zip(map(int, text.split(":")), (20, 40), strict=True):
                finish(workdir, count, steps)
            losses, expected = ([*losses_of(run).values()] for run in (workdir, one))
            of_losses = np.abs(np.subtract(losses, expected) / expected).max()
            pairs = zip(params_of(workdir), params_of(one), strict=True)
            of_params = max(float(np.abs(a - b).max()) for a, b in pairs)
            table.add(text.replace(":", " → "), f"{of_losses:.1e}", f"{of_params:.1e}")
    table.show()


def params_of(workdir):
    state = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / "40" / "default")
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state["params"])]


def ip(words):
    subprocess.run(["ip", *words.split()], check=True)


@contextlib.contextmanager
def cable():
    """A cable between two network namespaces."""
    first, second = NAMESPACES
    with contextlib.ExitStack() as stack:
        for name in NAMESPACES:
            ip(f"netns add {name}")
            stack.callback(ip, f"netns del {name}")
        ip(f"link add eth0 netns {first} type veth peer name eth0 netns {second}")
        for number, name in enumerate(NAMESPACES, 1):
            ip(f"-n {name} addr add 10.9.0.{number}/24 dev eth0")
            for device in ("lo", "eth0"):
                ip(f"-n {name} link set {device} up")
        yield


def pull_cable():
    """Pull the cable between two processes at work; whether both ended as they should."""
    with tempfile.TemporaryDirectory() as name, cable():
        workdir = pathlib.Path(name) / "run"
        prefixes = [["ip", "netns", "exec", name] for name in NAMESPACES]
        processes = start(workdir, 2, 10**6, host=HOST, prefixes=prefixes)
        at_work(workdir, processes)
        ip(f"-n {NAMESPACES[1]} link set eth0 down")
        seconds, codes, line = ended(processes, time.monotonic(), workdir)
    print(f"the cable was pulled: both ended after {seconds:.0f} s with {codes}: {line}")
    return codes == [6, 6] and seconds < 30


def main():
    """Try what the command line asks for; exits with 0 if all was well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lose", type=int, nargs="+", default=[], help="numbers of processes")
    parser.add_argument("--change", nargs="+", default=[], help="before:after")
    parser.add_argument("--cable", action="store_true", help="pull it between two processes")
    options = parser.parse_args()
    if options.change:
        change(options.change)
    well = lose(options.lose) if options.lose else True
    well &= pull_cable() if options.cable else True
    sys.exit(not well)


if __name__ == "__main__":
    main()
