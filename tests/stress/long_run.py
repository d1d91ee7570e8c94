"""What a long training takes of its machine, early and late: memory, files, threads, disk.

    python -m tests.stress.long_run --steps 20000 --every 50

Trains a small network on digits with a checkpoint every few steps, and prints a table of the
process at several steps. All must stay as it was, but for metrics and checkpoints that are kept.
"""

import argparse
import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile

from benchmarks.measure import Table
from tests.jobs import DIGITS, TINY, last_step, start, steps_of, wait_until

COLUMNS = ("memory, MiB", "open files", "threads", "checkpoints", "files", "disk, MiB")


def state_of(process, workdir):
    """The cells of COLUMNS; the disk without metrics."""
    said = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in said)
    memory, threads = int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"])
    opened, size = len(os.listdir(f"/proc/{process}/fd")), 0
    files = [path for path in workdir.rglob("*") if path.is_file()]
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # an old checkpoint that is being deleted
            if not ("metrics" in path.name or "tfevents" in path.name):
                size += path.stat().st_size
    return memory, opened, threads, len(steps_of(workdir)), len(files), size / 2**20


def main():
    """Train, and print a row whenever a step of the table is reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    options = parser.parse_args()
    table = Table("step", *COLUMNS)
    with tempfile.TemporaryDirectory() as name:
        workdir = pathlib.Path(name) / "run"
        fields = [f"n_iters={options.steps}", f"snapshot_freq_for_preemption={options.every}"]
        fields += ["log_freq=50", "eval_freq=500", "snapshot_freq=1000000"]
        args = [*TINY, *(f"--config.training.{field}" for field in fields), f"--workdir={workdir}"]
        process = start(DIGITS, *args, stderr=subprocess.DEVNULL)
        for share in (0.025, 0.1, 0.25, 0.5, 0.75, 0.99):
            step = round(share * options.steps)
            wait_until(lambda step=step: last_step(workdir) >= step, process, every=0.2)
            table.add(last_step(workdir), *state_of(process.pid, workdir))
        status = process.wait()
    table.show()
    sys.exit(status)


if __name__ == "__main__":
    main()
