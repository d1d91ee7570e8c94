"""LSUN's LMDB environments: keys are hashes, values are encoded images."""

import contextlib
import pathlib
import struct
import subprocess
import sys
import threading
import weakref

import numpy as np

from errors import UserError
from readers import lmdb_server
from readers.containers import damaged, file_identity
from readers.image_files import find_splits
from readers.layout import Found, Opened, Records

_SPLITS = ("train", "val")


class _Environment:
    """An LMDB environment, read by lmdb_server.py in another process."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Open it, and read its keys."""
        command = [sys.executable, lmdb_server.__file__, str(folder)]
        self._folder, self._lock = folder, threading.Lock()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        weakref.finalize(self, _end, self._process)
        # One array instead of a list, since a scene has up to three million keys.
        self.keys = np.array(list(iter(self._reply, b"")), np.bytes_)

    def _read(self, count: int) -> bytes:
        assert self._process.stdout is not None
        value = self._process.stdout.read(count)
        if len(value) < count:
            raise damaged(self._folder, "LMDB's library ended at one of its pages")
        return value

    def _reply(self) -> bytes:
        (length,) = struct.unpack("<q", self._read(8))
        value = self._read(abs(length))
        if length < 0:
            raise damaged(self._folder, value.decode())
        return value

    def get(self, key: bytes) -> bytes:
        """The value of a key; threads take turns."""
        assert self._process.stdin is not None
        with self._lock:
            with contextlib.suppress(BrokenPipeError):  # its end is told by the reply
                self._process.stdin.write(struct.pack("<q", len(key)) + key)
                self._process.stdin.flush()
            return self._reply()


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a server and close its pipes, of which the interpreter would complain at its own end."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


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
    folders = [path / f"{category}_{split}_lmdb" for split in _SPLITS]
    there = [(folder / "data.mdb").exists() for folder in folders]
    if any(there):
        if not all(there):
            missing = folders[there.index(False)].name
            raise UserError(
                f"data.path: {path} has no {missing}/; unpack the authors' {missing}.zip there"
            )
        return Found(
            f"the authors' LMDB environments {category}_*_lmdb in {path}",
            tuple(file_identity(folder / "data.mdb") for folder in folders),
            lambda: Opened(_records(folders[0]), _records(folders[1])),
        )
    zips = [path / f"{folder.name}.zip" for folder in folders]
    if any(file.exists() for file in zips):
        raise UserError(
            f"data.path: {path} has {zips[0].name}, and an LMDB environment can't be read within a "
            f"zip; unpack it: unzip -d {path} {zips[0]}"
        )
    return find_splits(path, 0, f"{category}_", f"exported images of LSUN's {category}")
