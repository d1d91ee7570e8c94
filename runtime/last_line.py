"""Passes on a process's stderr, and replaces JAX's report of a lost process by one line.

JAX's coordination service ends a process by an abort in C++, after many lines with a stack trace,
and no Python code of that process can run then. So a second process reads its stderr (`relay`). It
runs this file as a program, which needs no packages.
"""

import os
import re
import signal
import subprocess
import sys

# The first line of the report. What follows it, up to the end of the process, belongs to it.
_BEGINS = re.compile(rb"^F\d{4} .*JAX distributed service detected fatal errors")
# The service is in process 0, and does not answer.
_WITHOUT_SERVICE = re.compile(r"Failed to send RPC to coordination service|/Heartbeat")
# Processes that gave no sign of life, or did not end with the others.
_NAMES = re.compile(r"(?:stopped sending heartbeats\)|timed out task names):\s*((?:\d+\s+)+)")


def relay() -> None:
    """Let a second process pass on this process's stderr from now on, until this one ends."""
    reader = subprocess.Popen(
        # A session of its own: Ctrl-C is for this process, whose last lines are still to come.
        [sys.executable, "-S", __file__],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert reader.stdin
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()


def told(report: str) -> str:
    """One line that says the same as a report of JAX.

    Args:
      report: the report, from its first line on.
    """
    if "RegisterTask" in report:
        return (
            "the processes did not meet within --timeout seconds; was each of them started, with "
            "the same --coordinator_address and --num_processes?"
        )
    named = _NAMES.search(report)
    who = ["0"] if _WITHOUT_SERVICE.search(report) else named[1].split() if named else []
    lost = f"process {who[0]} was" if len(who) == 1 else f"processes {', '.join(who)} were"
    return (
        f"{lost if who else 'another process was'} lost; the same commands go on from what is kept"
    )


def _main() -> None:
    """Copy stdin to stderr."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    report: list[bytes] = []
    for line in sys.stdin.buffer:
        if report or _BEGINS.match(line):
            report.append(line)
        else:
            os.write(2, line)
    if report:
        text = told(b"".join(report).decode(errors="replace"))
        os.write(2, f"error: {text}\n".encode())


if __name__ == "__main__":
    _main()
