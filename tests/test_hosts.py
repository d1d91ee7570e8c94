"""What one of several processes is told when another one is lost, hangs, fails or never comes."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from configs.errors import UserError
from runtime import hosts, last_line

ROOT = pathlib.Path(__file__).parent.parent
# A process that only meets the others, says "there", and works until it is told to end.
ALONE = """
import os, sys, time
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
from runtime import hosts
hosts._PATIENCE, hosts._GRACE = 4, 1.0
index, count, port, ends = map(int, sys.argv[1:5])
with hosts.ending_together():
    hosts.initialize(f"127.0.0.1:{port}", count, index, detect=False, timeout=60)
    print("there", flush=True)
    time.sleep(ends + index)
    if sys.argv[5] == str(index):
        exec(sys.argv[6])
    elif sys.argv[5]:
        time.sleep(60)
"""


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(count, ends=60, one="", does=""):
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", ALONE, *map(str, (i, count, port, ends, one, does))],
            cwd=ROOT,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def lost(victim):
    return f"error: process {victim} was lost; the same commands go on from what is kept\n"


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_all_are_told_in_one_line_of_one_that_is_lost_or_hangs(victim, number):
    processes = start(3)
    assert [process.stdout.readline() for process in processes] == ["there\n"] * 3
    processes[victim].send_signal(number)
    others = [p for i, p in enumerate(processes) if i != victim]
    assert [process.communicate(timeout=30)[1] for process in others] == [lost(victim)] * 2
    assert all(process.returncode > 0 for process in others)  # by no signal, so without a dump
    processes[victim].kill()
    processes[victim].communicate()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("does", "own"),
    [("sys.exit(2)", ""), ("1 / 0", "ZeroDivisionError: division by zero")],
)
def test_the_error_of_one_ends_the_others(victim, does, own):
    processes = start(2, ends=1, one=victim, does=does)
    told = [process.communicate(timeout=30)[1] for process in processes]
    assert told[1 - victim] == lost(victim)
    assert (told[victim].strip().splitlines() or [""])[-1] == own
    assert processes[victim].returncode == (1 if own else 2)


@pytest.mark.slow
def test_one_after_the_other_may_end_as_it_should():
    processes = start(3, ends=1)
    assert [process.communicate(timeout=60) for process in processes] == [("there\n", "")] * 3
    assert [process.returncode for process in processes] == [0, 0, 0]


@pytest.mark.slow
def test_where_one_never_comes_the_others_say_so():
    command = [sys.executable, "main.py", "--config=configs/vp/digits_st.py", "--timeout=2"]
    place = [f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=3"]
    done = subprocess.run(
        [*command, *place, "--process_id=0"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode > 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the processes did not meet within --timeout seconds")


def test_an_error_that_may_come_from_a_loss_waits_for_jax_and_others_do_not(monkeypatch, capsys):
    waited, ended = [], []
    monkeypatch.setattr(hosts.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(hosts.time, "sleep", waited.append)
    monkeypatch.setattr(hosts.os, "_exit", ended.append)
    for error in (ValueError("UNKNOWN: Gloo AllReduce failed"), ValueError("mine"), SystemExit(2)):
        with hosts.ending_together():
            raise error
    assert ended == [1, 1, 2] and waited.count(hosts._GRACE) == 3
    assert [seconds > hosts._PATIENCE for seconds in waited] == [True, False, False, False]
    assert "UNKNOWN" in capsys.readouterr().err
    monkeypatch.setattr(hosts.jax.distributed, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match="mine"), hosts.ending_together():
        raise ValueError("mine")


@pytest.mark.parametrize(
    ("report", "told"),
    [
        ("(stopped sending heartbeats):\n2\n10\nThe tasks", "processes 2, 10 were lost; the same"),
        ("Failed to send RPC to coordination service. Either", "process 0 was lost; the same"),
        ("DEADLINE_EXCEEDED\n\nRPC: /x/Heartbeat", "process 0 was lost; the same"),
        ("DEADLINE_EXCEEDED\n\nRPC: /x/RegisterTask", "the processes did not meet within"),
        (
            "Some timed out task names:\n0\n [type",
            "process 0 was lost; the same",
        ),
        ("in words of another JAX", "another process was lost; the same"),
    ],
)
def test_a_report_of_jax_is_told_in_one_line(report, told):
    line = last_line.told(report)
    assert line.startswith(told) and "\n" not in line


def test_what_a_process_says_passes_and_only_the_report_is_shortened():
    code = (
        "import os, sys\nfrom runtime import last_line\nlast_line.relay()\n"
        "print('of Python', file=sys.stderr, flush=True)\nos.write(2, 'of C: ä\\n'.encode())\n"
        "os.write(2, b'F1201 02:45:01 1 client.h:80] Terminating process because the JAX "
        "distributed service detected fatal errors.\\nRPC\\n*** stack trace\\n')\nos._exit(6)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    *passed, last = done.stderr.decode().splitlines()
    assert passed == ["of Python", "of C: ä"] and last.startswith("error: another process was lost")


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["nowhere", 2, 0], "--coordinator_address is 'nowhere'; it must be host:port"),
        (["127.0.0.1:1234", 2, 2], "--process_id is 2; it must be from 0 to 1"),
    ],
)
def test_wrong_flags(flags, problem):
    with pytest.raises(UserError, match=problem):
        hosts.initialize(*flags, detect=False, timeout=1)
