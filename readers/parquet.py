"""Parquet files of the Hugging Face hub, with a column of images and optionally one of labels."""

import functools
import itertools
import json
import pathlib
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.errors import UserError
from readers import layout
from readers.containers import Folder, file_identity, reading
from readers.splits import TEST_NAMES, divide, split_of

# train-00000-of-00002.parquet, with or without the hash that the hub's names had in 2022; or
# train/0000.parquet.
_SHARD = re.compile(r"((?P<base>.*?)-?(?P<number>\d+)-of-(?P<of>\d+)(-[0-9a-f]{16})?|\d+)", re.I)
_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "fine_label", "target")


def _splits_of(path: pathlib.Path) -> dict[str, dict[str, list[pathlib.Path]]]:
    """{configuration: {split: its files in order}} of the parquet files at a path."""
    found: dict[str, dict[str, list[pathlib.Path]]] = {}
    files = [path] if path.is_file() else [path / name for name in Folder(path).names()]
    files = [file for file in files if file.suffix == ".parquet"]
    for file in files:
        folder, match = file.parent, _SHARD.fullmatch(file.stem)
        base = match["base"] if match else file.stem
        if not base:  # train/0000.parquet, converted by the hub
            base, folder = folder.name, folder.parent
        split = split_of(base) or ("train" if len(files) == 1 else "")
        split = "train" if split == "training" else split
        # A repository without configurations has its files in data/.
        folder = folder.parent if folder.name == "data" and folder != path else folder
        if split:
            found.setdefault(str(folder), {}).setdefault(split, []).append(file)
    for splits in found.values():
        for shards in splits.values():
            _check_shards(shards)
    return {name: splits for name, splits in found.items() if "train" in splits}


def _check_shards(files: Sequence[pathlib.Path]) -> None:
    """Raise UserError if the files of a split are not the shards 0, 1, … of one set."""
    shards = [_SHARD.fullmatch(file.stem) for file in files]
    numbers = [int(shard["number"] or shard[0]) if shard else 0 for shard in shards]
    counts = {shard and shard["of"] for shard in shards}
    whole = int(next(iter(counts)) or len(files)) if len(counts) == 1 else 0
    if not whole or len(set(numbers)) < len(numbers):
        names = ", ".join(file.name for file in files[:6])
        raise UserError(
            f"{files[0].parent} has {names}, which are not the shards of one data set; keep those "
            "of one"
        )
    missing = next(i for i in range(len(files) + 1) if i not in numbers)
    if shards[0] and (missing < len(files) or len(files) != whole):
        raise UserError(
            f"{files[0].parent} lacks shard {missing} of {whole} beside {files[0].name} (it has "
            f"{len(files)}); bring all of them"
        )


class _File:
    """The rows of a file."""

    def __init__(self, path: pathlib.Path) -> None:
        """Open it, and find the columns of images and labels; UserError if it can't be read."""
        import pyarrow
        import pyarrow.parquet

        self.path = path
        with reading(path):
            self.opened = pyarrow.parquet.ParquetFile(path)
        groups = map(self.opened.metadata.row_group, range(self.opened.num_row_groups))
        self._starts = np.cumsum([0, *(group.num_rows for group in groups)])
        schema, types = self.opened.schema_arrow, pyarrow.types
        structs = [
            field.name
            for field in schema
            if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        ]
        named = [name for name in structs if name in _IMAGE_NAMES] or structs
        if len(named) != 1:
            raise UserError(
                f"{path} has the columns {', '.join(schema.names)}; one of encoded images, "
                "named image or img, is needed"
            )
        self.image = named[0]
        self._label = next((name for name in _LABEL_NAMES if name in schema.names), None)
        self.class_names = _class_names(schema.metadata or {}, self._label)

    def labels(self) -> tuple[list[Any] | None, str]:
        """(labels or None; why a column of them is not used); UserError if a label is missing."""
        import pyarrow

        if self._label is None:
            return None, ""
        column = self.opened.read(columns=[self._label]).column(self._label)
        text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
        if not text and not pyarrow.types.is_integer(column.type):
            return None, f"labels are not used: {self._label} of {self.path} is {column.type}"
        labels = column.to_pylist()
        if column.null_count:
            raise UserError(
                f"{self.path} has no {self._label} in row {labels.index(None)} "
                f"({column.null_count} of {len(labels)} are missing)"
            )
        return labels, ""

    def records(self) -> layout.Records:
        """The rows, without labels."""
        return layout.Records(int(self._starts[-1]), self._item, lambda i: f"{self.path}, row {i}")

    def _item(self, i: int) -> layout.Item:
        group = int(np.searchsorted(self._starts, i, side="right")) - 1
        with _LOCK:
            data = _rows(self, group)[i - int(self._starts[group])]
        if data is None:
            raise ValueError("it holds no image, or only a path")
        return data, 0


_LOCK = threading.Lock()


@functools.lru_cache(4)
def _rows(file: _File, group: int) -> list[bytes | None]:
    """The encoded images of a row group; the last few stay in memory."""
    with reading(file.path):
        table = file.opened.read_row_group(group, columns=[file.image])
        rows: list[Any] = table.column(file.image).to_pylist()
    return [row and row["bytes"] for row in rows]


def _class_names(metadata: dict[bytes, bytes], label: str | None) -> list[str]:
    """The names of the classes in the schema's metadata; empty if there are none."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return list(map(str, features[label]["names"]))
    except (KeyError, TypeError, ValueError, RecursionError):
        return []


def _open(splits: list[list[pathlib.Path]]) -> layout.Opened:
    records, labels = [], list[Any]()
    notes, names = list[str](), list[str]()
    for paths in splits:
        files = [_File(path) for path in paths]
        names = names or files[0].class_names
        records.append(layout.Records.joined([file.records() for file in files]))
        parts, told = zip(*(file.labels() for file in files), strict=True)
        known = None if None in parts else [label for part in parts for label in part]
        # -1 is how the hub marks images without labels.
        unlabelled = any(isinstance(label, int) and label < 0 for label in known or ())
        labels.append(None if unlabelled else known)
        notes += told
    return layout.Opened(*divide(records, labels, names, notes))


def find(path: pathlib.Path, needs_splits: bool = False) -> layout.Found | None:
    """A folder with train-00000-of-0000N.parquet and test-… or validation-…, or a single file.

    Without a test split every tenth row is held out; with `needs_splits` that is refused.
    """
    if path.is_file() and path.suffix != ".parquet":
        return None
    configurations = _splits_of(path)
    if not configurations:
        if path.is_file() or next(path.rglob("*.parquet"), None):
            raise UserError(
                f"data.path: {path} has parquet files, and none is called train-00000-of-00001"
                ".parquet or so; names say which split a file is of"
            )
        return None
    if len(configurations) > 1:
        names = ", ".join(sorted(pathlib.Path(name).name for name in configurations))
        raise UserError(
            f"data.path: {path} has {len(configurations)} configurations, {names}; name the folder "
            "of one of them"
        )
    ((folder, splits),) = configurations.items()
    test = next((name for name in TEST_NAMES if name in splits), None)
    if test is None and needs_splits:
        raise UserError(f"data.path: {folder} has a training split alone; a test split is needed")
    files = [splits["train"], splits[test]] if test else [splits["train"]]
    how = f"splits train and {test}" if test else "every tenth row held out"
    return layout.Found(
        f"parquet files in {folder}, {how}",
        tuple(map(file_identity, itertools.chain(*files))),
        lambda: _open(files),
    )
