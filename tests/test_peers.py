"""What one of several processes is told when another one is lost, hangs, fails or never comes."""

import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from runtime import peers

ROOT = pathlib.Path(__file__).parent.parent
# A process with its connections alone: it says "there" and works until it is told to end.
ALONE = """
import sys, time
from runtime import peers
peers.PATIENCE = 3.0
index, count, port, ends = map(int, sys.argv[1:])
mine = peers.Peers(index, count)
mine.join("127.0.0.1", port, 20) if index else mine.gather(port, 20)
mine.describe = lambda: (" at step 7", "from step 5")
print("there", flush=True)
time.sleep(ends)
mine.leave(well=True)
"""


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(count, ends=60, indices=None):
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE, *map(str, (i, count, port, ends))],
            cwd=ROOT,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (range(count) if indices is None else indices)
    ]
    return processes


def test_those_that_end_because_they_are_told_are_not_what_was_lost(monkeypatch):
    mine, said = peers.Peers(0, 3), []
    near, far = zip(*(socket.socketpair() for _ in range(2)), strict=True)

    def tell(_):  # the second process ends before this one does
        far[1].close()
        time.sleep(0.3)

    monkeypatch.setattr(mine, "_tell", tell)
    monkeypatch.setattr(mine, "_end", said.append)
    for index in (1, 2):
        mine._add(index, near[index - 1])
    far[0].close()
    time.sleep(1)
    assert said == ["process 1 was lost; the same commands go on from the newest checkpoint"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the options are Linux's")
def test_the_kernel_gives_a_silent_machine_up_after_15_seconds():
    mine = peers.Peers(0, 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.create_connection(server.getsockname())
        near, _ = server.accept()
    mine._add(1, near)
    options = (socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL)
    assert [near.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [15_000, 5, 3]
    mine.leave(well=True)
    far.sendall(b"!")
    far.close()


def test_what_is_no_process_is_turned_away_and_the_start_goes_on(monkeypatch):
    monkeypatch.setattr(peers, "_GRACE", 0.3)
    mine, other, port = peers.Peers(0, 2), peers.Peers(1, 2), free_port()
    gathering = threading.Thread(target=mine.gather, args=(port, 20))
    gathering.start()
    time.sleep(0.2)
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
    strangers[1].sendall((1).to_bytes(4, "big"))
    strangers[2].sendall(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n")
    strangers[3].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    strangers[3].close()  # by a reset, as a port scan does
    other.join("127.0.0.1", port, 20)
    gathering.join(5)
    assert not gathering.is_alive() and list(mine._sockets) == [1]
    for peer in (other, mine):
        peer.leave(well=True)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_all_are_told_of_one_that_is_lost_or_hangs(victim, number):
    processes = start(3)
    assert [process.stdout.readline() for process in processes] == ["there\n"] * 3
    began = time.monotonic()
    processes[victim].send_signal(number)
    others = [p for i, p in enumerate(processes) if i != victim]
    told = [process.communicate(timeout=20)[1] for process in others]
    assert time.monotonic() - began < 10
    assert [process.returncode for process in others] == [1, 1]
    why = "was lost" if number == signal.SIGKILL else "has not answered for 3 seconds"
    text = f"error: process {victim} {why}"
    rest = (
        " at step 7; the same commands go on from step 5\n"
        if victim
        else ("; the same commands go on from the newest checkpoint\n")
    )
    assert told == [text + rest] * 2
    processes[victim].kill()
    processes[victim].communicate()


def test_one_after_the_other_may_end_as_it_should():
    processes = start(3, ends=1)
    assert [process.communicate(timeout=30) for process in processes] == [("there\n", "")] * 3
    assert [process.returncode for process in processes] == [0, 0, 0]


def test_one_that_never_comes_is_named():
    command = [sys.executable, "main.py", "--config=configs/vp/digits_st.py", "--timeout=2"]
    place = [f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=3"]
    done = subprocess.run(
        [*command, *place, "--process_id=0"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "within 2 seconds (--timeout): processes 1, 2 did not come"
    )


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["nowhere", 2, 0], "--coordinator_address is 'nowhere'; it must be host:port"),
        (["127.0.0.1:1234", 2, 2], "--process_id is 2; it must be from 0 to 1"),
    ],
)
def test_wrong_flags(flags, problem):
    from errors import UserError
    from runtime import hosts

    with pytest.raises(UserError, match=problem):
        hosts.initialize(*flags, detect=False, timeout=1)
