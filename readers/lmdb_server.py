"""Reads an LMDB environment for readers/lsun.py, in a process of its own.

LMDB's C library trusts its file: at some damaged pages it ends the process that reads them.

It sends the keys, as lists in JSON, and an empty message. Then it answers each key with its value,
until the other end is closed. An answer begins with `VALUE`; with `ERROR` it is an error's text.
"""

import contextlib
import itertools
import json
import pathlib
import signal
import sys
from multiprocessing.connection import Connection

VALUE, ERROR = b"=", b"!"


def serve(folder: pathlib.Path, other: Connection) -> None:
    """Serve the environment in `folder`."""
    import lmdb

    try:
        environment = lmdb.open(
            str(folder), readonly=True, lock=False, readahead=False, create=False, max_readers=512
        )
        stat = environment.stat()
        size, entries = (environment.info()["last_pgno"] + 1) * stat["psize"], stat["entries"]
        if (folder / "data.mdb").stat().st_size < size:
            raise lmdb.CorruptedError(f"data.mdb is shorter than its {size} bytes")
        with environment.begin() as transaction, transaction.cursor() as cursor:
            keys, number = cursor.iternext(values=False), 0
            while block := [key.decode("latin1") for key in itertools.islice(keys, 10_000)]:
                number += len(block)
                if number > entries:  # damaged pages can refer to each other
                    raise lmdb.CorruptedError(f"it has more than its {entries} entries")
                other.send_bytes(VALUE + json.dumps(block).encode())
        other.send_bytes(VALUE)
        while True:
            key = other.recv_bytes()
            with environment.begin() as transaction:
                value = transaction.get(key)
            if value is None:
                raise lmdb.NotFoundError(f"it has no value of {key!r}")
            other.send_bytes(VALUE + value)
    except lmdb.Error as error:
        other.send_bytes(ERROR + (str(error) or "unreadable").encode())


if __name__ == "__main__":
    # Ctrl-C reaches this process, too, but the training finishes its step and needs its images.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):  # the end of the other process
        serve(pathlib.Path(sys.argv[1]), Connection(int(sys.argv[2])))
