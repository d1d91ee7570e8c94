"""LSUN's LMDB environments: keys are hashes, values are encoded images."""

import pathlib

import numpy as np

from configs.default import UserError
from readers.containers import damaged, file_identity
from readers.image_files import find_splits
from readers.layout import Found, Item, Opened, Records

_SPLITS = ("train", "val")


def _records(folder: pathlib.Path) -> Records:
    import lmdb

    try:
        environment = lmdb.open(
            str(folder), readonly=True, lock=False, readahead=False, create=False, max_readers=512
        )
        # Reading beyond the end of a file that is cut off would end the program.
        size = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if (folder / "data.mdb").stat().st_size < size:
            raise damaged(folder, f"data.mdb is shorter than its {size} bytes")
        with environment.begin() as transaction, transaction.cursor() as cursor:
            # One array instead of a list, since a scene has up to three million keys.
            keys = np.array(list(cursor.iternext(values=False)), np.bytes_)
    except lmdb.Error as error:
        raise damaged(folder, error) from error

    def read(i: int) -> Item:
        with environment.begin() as transaction:
            value = transaction.get(bytes(keys[i]))
        if value is None:
            raise damaged(folder, f"it has no value of {keys[i]}")
        return bytes(value), 0

    return Records(len(keys), read, lambda i: f"{folder}, {keys[i].decode()}")


def find(path: pathlib.Path, category: str) -> Found | None:
    """A scene's two LMDB environments in a folder, or images exported by LSUN's data.py.

    Args:
      path: a folder with bedroom_train_lmdb/ and bedroom_val_lmdb/, or with exported images in
        train/ and val/ or bedroom_train/ and bedroom_val/, flat or in nested folders.
      category: the scene, for example bedroom.
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
