"""Reads an LMDB environment for readers/lsun.py, in a process of its own.

LMDB's C library trusts its file: at some damaged pages it ends the process that reads them.

Replies are a length in eight bytes and as many bytes; a negative length comes before an error's
text. The first ones are the keys, and an empty one. Then a length and a key are asked for their
value, until standard input ends.
"""

import pathlib
import signal
import struct
import sys


def _reply(value: bytes, sign: int = 1) -> None:
    sys.stdout.buffer.write(struct.pack("<q", sign * len(value)) + value)


def main(folder: str) -> None:
    """Serve the environment in `folder`."""
    import lmdb

    # Ctrl-C reaches this process, too, but the training finishes its step and needs its images.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    try:
        environment = lmdb.open(
            folder, readonly=True, lock=False, readahead=False, create=False, max_readers=512
        )
        stat = environment.stat()
        size, entries = (environment.info()["last_pgno"] + 1) * stat["psize"], stat["entries"]
        if (pathlib.Path(folder) / "data.mdb").stat().st_size < size:
            raise lmdb.CorruptedError(f"data.mdb is shorter than its {size} bytes")
        with environment.begin() as transaction, transaction.cursor() as cursor:
            for number, key in enumerate(cursor.iternext(values=False)):
                if number == entries:  # damaged pages can refer to each other
                    raise lmdb.CorruptedError(f"it has more than its {entries} entries")
                if key:
                    _reply(key)
        _reply(b"")
        while True:
            sys.stdout.buffer.flush()
            length = sys.stdin.buffer.read(8)
            if not length:
                return
            with environment.begin() as transaction:
                key = sys.stdin.buffer.read(*struct.unpack("<q", length))
                value = transaction.get(key)
            if value is None:
                raise lmdb.NotFoundError(f"it has no value of {key!r}")
            _reply(value)
    except lmdb.Error as error:
        _reply(str(error).encode() or b"unreadable", -1)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1])
