"""Parquet files of the Hugging Face hub, with a column of images and optionally one of labels."""

import collections
import json
import pathlib
import re
import threading
from typing import Any

import numpy as np

from configs.default import UserError
from readers.containers import damaged, file_identity
from readers.layout import Found, Item, Opened, Records, every_tenth, number_labels

_NAME = re.compile(r"(train|test|validation|valid|val)(-\d+-of-\d+)?\.parquet")
_TEST_NAMES = ("test", "validation", "valid", "val")
_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "fine_label")
_GROUPS_KEPT = 4  # row groups in memory


def _splits_of(path: pathlib.Path) -> dict[str, dict[str, list[pathlib.Path]]]:
    """{configuration: {split: its files in order}} of the parquet files at a path."""
    found: dict[str, dict[str, list[pathlib.Path]]] = {}
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    for file in files:
        folder, match = file.parent, _NAME.fullmatch(file.name)
        if match:
            split = match[1]
        elif re.fullmatch(r"\d+\.parquet", file.name):  # train/0000.parquet, converted by the hub
            split, folder = folder.name, folder.parent
        else:
            continue
        # A repository without configurations has its files in data/.
        folder = folder.parent if folder.name == "data" and folder != path else folder
        found.setdefault(str(folder.relative_to(path) if path.is_dir() else folder), {}).setdefault(
            split, []
        ).append(file)
    return {name: splits for name, splits in found.items() if "train" in splits}


class _Files:
    """The concatenated rows of several files; the last few row groups are kept in memory."""

    def __init__(self, files: list[pathlib.Path]) -> None:
        """Open all files, and find the columns of images and labels."""
        import pyarrow
        import pyarrow.parquet

        self.files, self._lock = files, threading.Lock()
        self._kept: collections.OrderedDict[tuple[int, int], list[bytes]] = (
            collections.OrderedDict()
        )
        starts, places = [0], []
        try:
            self._opened = [pyarrow.parquet.ParquetFile(file) for file in files]
        except (OSError, pyarrow.ArrowException) as error:
            raise damaged(files[0], error) from error
        for number, opened in enumerate(self._opened):
            for group in range(opened.num_row_groups):
                starts.append(starts[-1] + opened.metadata.row_group(group).num_rows)
                places.append((number, group))
        self._starts, self._places = np.array(starts), places
        schema = self._opened[0].schema_arrow
        structs = [
            field.name
            for field in schema
            if pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        ]
        named = [name for name in structs if name in _IMAGE_NAMES] or structs
        if len(named) != 1:
            raise UserError(
                f"{files[0]} has the columns {', '.join(schema.names)}; one of encoded images, "
                "named image or img, is needed"
            )
        self._image = named[0]
        self.label = next(
            (
                name
                for name in _LABEL_NAMES
                if name in schema.names and pyarrow.types.is_integer(schema.field(name).type)
            ),
            None,
        )
        self.class_names = _class_names(schema.metadata or {}, self.label)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def labels(self) -> np.ndarray | None:
        """Labels (N,), or None if there are none; UserError if a label is missing."""
        if self.label is None:
            return None
        parts = []
        for file, opened in zip(self.files, self._opened, strict=True):
            column = opened.read(columns=[self.label]).column(self.label)
            if column.null_count:
                row = column.to_pylist().index(None)
                raise UserError(
                    f"{file} has no {self.label} in row {row} ({column.null_count} of "
                    f"{len(column)} are missing)"
                )
            parts.append(column.to_numpy())
        labels = np.concatenate(parts).astype(np.int64)
        return None if (labels < 0).any() else labels  # the hub marks unlabelled splits by -1

    def image(self, i: int) -> bytes:
        """The encoded image of a row."""
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        with self._lock:
            rows = self._rows(self._places[number])
        data = rows[i - int(self._starts[number])]
        if data is None:
            raise UserError(f"{self.name(i)} holds no image, only a path")
        return data

    def _rows(self, place: tuple[int, int]) -> list[bytes]:
        if place not in self._kept:
            file, group = place
            try:
                table = self._opened[file].read_row_group(group, columns=[self._image])
            except Exception as error:  # Arrow raises many kinds of error for damaged files
                raise damaged(self.files[file], error) from error
            rows: list[Any] = table.column(self._image).to_pylist()
            self._kept[place] = [row and row["bytes"] for row in rows]
            if len(self._kept) > _GROUPS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(place)
        return self._kept[place]

    def name(self, i: int) -> str:
        """A description of a row, for messages."""
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        file, group = self._places[number]
        row = i - int(self._starts[number])
        return f"{self.files[file]}, row {row} of group {group}"


def _class_names(metadata: dict[bytes, bytes], label: str | None) -> list[str]:
    """The names of the classes in the schema's metadata; empty if there are none."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return list(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return []


def _records(files: _Files, rows: np.ndarray, labels: np.ndarray | None) -> Records:
    """Records of these rows, with a label for each."""
    of = np.zeros(len(rows), np.int64) if labels is None else labels

    def read(i: int) -> Item:
        return files.image(int(rows[i])), int(of[i])

    return Records(len(rows), read, lambda i: files.name(int(rows[i])))


def _open(train_files: list[pathlib.Path], test_files: list[pathlib.Path]) -> Opened:
    try:
        return _open_files(train_files, test_files)
    except UserError:
        raise
    except Exception as error:  # Arrow raises many kinds of error for damaged files
        raise damaged(train_files[0].parent, error) from error


def _open_files(train_files: list[pathlib.Path], test_files: list[pathlib.Path]) -> Opened:
    parts = [_Files(paths) for paths in (train_files, test_files) if paths]
    labels = [part.labels() for part in parts]
    if len(parts) == 2:
        rows = [(part, np.arange(len(part))) for part in parts]
    else:
        rows = [(parts[0], indices) for indices in every_tenth(len(parts[0]))]
        labels = [None if labels[0] is None else labels[0][indices] for _, indices in rows]
    of_train, of_test, classes, notes = number_labels(labels, parts[0].class_names)
    train, test = (
        _records(part, indices, of)
        for (part, indices), of in zip(rows, (of_train, of_test), strict=True)
    )
    return Opened(train, test, classes, notes)


def find(path: pathlib.Path, needs_splits: bool = False) -> Found | None:
    """A folder with train-00000-of-0000N.parquet and test-… or validation-…, or a single file.

    Args:
      path: the folder, a parent folder, or one file without splits.
      needs_splits: refuse files without a test split, instead of holding out every tenth row.
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
        raise UserError(
            f"data.path: {path} has {len(configurations)} configurations, "
            f"{', '.join(sorted(configurations))}; name the folder of one of them"
        )
    ((folder, splits),) = configurations.items()
    test = next((name for name in _TEST_NAMES if name in splits), None)
    if test is None and needs_splits:
        raise UserError(f"data.path: {folder} has a training split alone; a test split is needed")
    test_files = splits[test] if test else []
    how = f"splits train and {test}" if test else "every tenth row held out"
    return Found(
        f"parquet files in {folder}, {how}",
        tuple(map(file_identity, [*splits["train"], *test_files])),
        lambda: _open(splits["train"], test_files),
    )
