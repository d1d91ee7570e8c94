"""What happens to a training of several processes when one is killed, hangs, or is told to stop.

    python -m benchmarks.lost_peer --processes 2 3

Trains over loopback, sends one process a signal at a random time, and prints for each case in how
many seconds the others had ended, with which status, and their last line. Then the same commands
must go on.
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
    command += [f"--num_processes={count}", f"--coordinator_address=127.0.0.1:{port}"]
    return [
        subprocess.Popen([*command, f"--process_id={i}"], stderr=subprocess.PIPE, text=True)
        for i in range(count)
    ]


def _last_step(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return rows[-1]["step"] if rows else 0


def main() -> None:
    """Send all signals to the first and to the last process; exits with 0 if all was well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 3])
    options = parser.parse_args()
    draw, bad = random.Random(0), 0
    print("| processes | signal | to | ended after, s | status | last line of another |")
    print("|---|---|---|---|---|---|")
    for count in options.processes:
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
                    own = processes[victim].communicate()[1]
                    said = [own, *said] if number == signal.SIGTERM and not victim else said
                    codes = [p.returncode for p in others]
                    line = (said[0].strip().splitlines() or [""])[-1].replace(str(workdir), "RUN")
                    wanted = 0 if number == signal.SIGTERM else 1
                    limit = 45 if number == signal.SIGSTOP else 20
                    well = codes == [wanted] * len(others) and seconds < limit
                    well = well and "Traceback" not in "".join(said)
                    again = _start(workdir, count, _last_step(workdir) + 5)
                    rest = [p.communicate(timeout=120)[1] for p in again]
                    well = well and not any(p.returncode for p in again) and "resumed" in rest[0]
                    bad += not well
                    print(
                        f"| {count} | {number.name} | {victim} | {seconds:.1f} | {codes} | "
                        f"{line}{'' if well else ' **WRONG**'} |",
                        flush=True,
                    )
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
