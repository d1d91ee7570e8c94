"""What a long training takes of its machine, early and late: memory, files, threads, disk.

    python -m benchmarks.long_run --steps 20000 --every 50

Trains a small network on digits with a checkpoint every few steps, and prints a table of the
process at several steps. All must stay as it was, but for metrics and checkpoints that are kept.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from runtime.metrics_log import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _state(pid: int, workdir: pathlib.Path) -> tuple[float, int, int, int, int, float]:
    """(MiB of memory, open files, threads, checkpoints, files, MiB of disk but for metrics)."""
    said = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in said)
    memory, threads = int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"])
    opened = len(os.listdir(f"/proc/{pid}/fd"))
    files = [p for p in workdir.rglob("*") if p.is_file()]
    growing = [p for p in files if "metrics" in p.name or "tfevents" in p.name]
    size = 0
    for path in set(files) - set(growing):
        try:
            size += path.stat().st_size
        except FileNotFoundError:  # an old checkpoint that is being deleted
            continue
    kept = len([p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()])
    return memory, opened, threads, kept, len(files), size / 2**20


def main() -> None:
    """Train, and print a row whenever a step of the table is reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        workdir = pathlib.Path(name) / "run"
        command = [sys.executable, str(ROOT / "main.py")]
        command += [f"--config={ROOT}/configs/vp/digits_st.py", f"--workdir={workdir}"]
        command += [f"--config.training.n_iters={options.steps}", "--config.model.nf=8"]
        command += ["--config.model.ch_mult=(1,)", "--config.model.attn_resolutions=()"]
        command += ["--config.training.batch_size=8", "--config.training.log_freq=50"]
        command += ["--config.training.eval_freq=500", "--config.training.snapshot_freq=1000000"]
        command += [f"--config.training.snapshot_freq_for_preemption={options.every}"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        print("| step | memory, MiB | open files | threads | checkpoints | files | disk, MiB |")
        print("|---|---|---|---|---|---|---|")
        for share in (0.025, 0.1, 0.25, 0.5, 0.75, 0.99):
            step, now = round(share * options.steps), 0
            while now < step and process.poll() is None:
                time.sleep(0.2)
                path = workdir / "metrics.jsonl"
                rows = read_metrics(path) if path.exists() else []
                now = rows[-1]["step"] if rows else 0
            if process.poll() is not None:
                sys.exit(f"the run ended at step {now} with {process.returncode}")
            memory, opened, threads, kept, files, size = _state(process.pid, workdir)
            print(
                f"| {now} | {memory:.0f} | {opened} | {threads} | {kept} | {files} | {size:.2f} |",
                flush=True,
            )
        sys.exit(process.wait())


if __name__ == "__main__":
    main()
