"""LSUN's LMDB environments: keys are hashes, values are encoded images."""

import contextlib
import json
import multiprocessing
import pathlib
import subprocess
import sys
import threading
import weakref

import numpy as np

from configs.errors import UserError
from readers import lmdb_server
from readers.containers import all_of, damaged, file_identity
from readers.image_files import find_splits
from readers.layout import Found, Opened, Records


class _Environment:
    """An LMDB environment, read by lmdb_server.py in another process."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Open it, and read its keys."""
        self._folder, self._lock = folder, threading.Lock()
        self._other, end = multiprocessing.Pipe()
        command = [sys.executable, lmdb_server.__file__, str(folder), str(end.fileno())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[end.fileno()]
        )
        end.close()
        weakref.finalize(self, _end, self._process)
        # One array instead of a list, since a scene has up to three million keys.
        blocks = [json.loads(block) for block in iter(self._reply, b"")]
        self.keys = np.array([key.encode("latin1") for block in blocks for key in block])

    def _reply(self) -> bytes:
        try:
            reply = self._other.recv_bytes()
        except (EOFError, OSError) as error:
            problem = "LMDB's library ended at one of its pages"
            raise damaged(self._folder, problem) from error
        if reply.startswith(lmdb_server.ERROR):
            raise damaged(self._folder, reply[1:].decode())
        return reply[1:]

    def get(self, key: bytes) -> bytes:
        """The value of a key; threads take turns."""
        with self._lock:
            with contextlib.suppress(OSError):  # its end is told by the reply
                self._other.send_bytes(key)
            return self._reply()


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def _records(folder: pathlib.Path) -> Records:
    environment = _Environment(folder)
    keys = environment.keys
    return Records(
        len(keys),
        lambda i: (environment.get(bytes(keys[i])), 0),
        lambda i: f"{folder}, {keys[i].decode()}",
    )


def find(path: pathlib.Path, category: str) -> Found | None:
    """A scene's two LMDB environments in a folder, or images exported by LSUN's data.py.

    They are bedroom_train_lmdb/ and bedroom_val_lmdb/; or train/ and val/, or bedroom_train/ and
    bedroom_val/, flat or in nested folders.
    """
    if not path.is_dir():
        return None
    names = [f"{category}_{split}_lmdb" for split in ("train", "val")]
    if files := all_of(path, [f"{name}/data.mdb" for name in names]):
        return Found(
            f"the authors' LMDB environments {category}_*_lmdb in {path}",
            tuple(map(file_identity, files)),
            lambda: Opened(_records(files[0].parent), _records(files[1].parent)),
        )
    zips = [path / f"{name}.zip" for name in names]
    if any(file.exists() for file in zips):
        raise UserError(
            f"data.path: {path} has {zips[0].name}, and an LMDB environment can't be read within a "
            f"zip; unpack it: unzip -d {path} {zips[0]}"
        )
    return find_splits(path, 0, f"{category}_", f"exported images of LSUN's {category}")
