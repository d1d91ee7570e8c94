"""Data sets prepared by TFDS, as TFRecord or array_record files; missing ones are prepared."""

import importlib
import json
import logging
import pathlib
import re
from typing import Any

from configs.errors import UserError
from data.labels import plain_classes
from readers import download, tfrecords
from readers.containers import file_identity, reading
from readers.layout import Found, Item, Opened, Records
from readers.splits import divide
from runtime import environment

log = logging.getLogger("soft_truncation")

_FEATURE = re.compile(r"tensorflow_datasets\.core\.features\.\w+\.\w+")


def _import(prepares: bool = False) -> Any:
    """TFDS; TensorFlow, which only its preparation of data sets needs, must not take the GPUs."""
    try:
        if prepares:
            environment.hide_gpus_from_tensorflow()
        import tensorflow_datasets
    except ImportError as error:
        needs = "TFDS needs TensorFlow to prepare a data set" if prepares else "it needs TFDS"
        install = "tensorflow" if prepares else "-r requirements.txt"
        raise UserError(
            f"data.tfds_dir: {needs}, and it can't be imported here ({error}); "
            f"pip install {install}"
        ) from error
    return tensorflow_datasets


def _prepared(data_dir: pathlib.Path, name: str) -> pathlib.Path | None:
    """The folder of the newest version that lies there."""
    folders = [info.parent for info in (data_dir / name).glob("*/dataset_info.json")]
    numbered = {folder: folder.name.split(".") for folder in folders}
    versions = {tuple(map(int, n)): f for f, n in numbered.items() if all(map(str.isdigit, n))}
    return versions[max(versions)] if versions else None


def _prepare(name: str, data_dir: pathlib.Path) -> pathlib.Path:
    """Have TFDS download and prepare a data set in a folder; UserError if it can't."""
    tfds = _import(prepares=True)
    log.info("%s is not in %s; TFDS downloads and prepares it there", name, data_dir)
    try:
        if name.startswith("lsun/"):
            _check_lmdb()
        builder = tfds.builder(name, data_dir=str(data_dir), file_format="array_record")
        urls = [url for url in builder.url_infos or {} if url.startswith("http")]
        if urls:
            download.check_reachable(urls[0])
        builder.download_and_prepare()
        return pathlib.Path(builder.data_path)
    except Exception as error:  # TFDS and the network raise anything at all
        raise UserError(
            f"TFDS can't prepare {name} in {data_dir}: {_reason(error)}. A folder that TFDS "
            "prepared elsewhere works too, in either file format; and docs/data.md says which of "
            "the authors' files are read without TFDS"
        ) from error


def _check_lmdb() -> None:
    """Raise UserError if TFDS can't read LSUN's LMDB files, before it downloads them."""
    try:
        importlib.import_module("tensorflow_io")
    except Exception as error:  # built for another TensorFlow, it raises anything at all
        raise UserError(
            "it reads LSUN's LMDB files by tensorflow-io, which can't be loaded beside this "
            "TensorFlow; data.path reads the authors' LMDB files themselves"
        ) from error


def _reason(error: Exception) -> str:
    text, kind = " ".join(str(error).split()), type(error).__name__
    if kind == "NonMatchingChecksumError":
        return "a downloaded file is not the published one (its checksum is another)"
    if isinstance(error, UserError) or text.startswith("Manual directory"):  # says what to bring
        return text
    return f"{kind}: {text[:300].rstrip('.')}" if text else kind


def _records(builder: Any, split: str, labelled: bool) -> Records:
    """A split of a prepared data set."""

    def parse(features: Any) -> Item:
        label = int(features["label"].int64_list.value[0]) if labelled else 0
        return features["image"].bytes_list.value[0], label

    info = builder.info
    if split not in info.splits:
        raise UserError(f"{builder.data_path} has no split {split}")
    if info.file_format.value == "tfrecord":
        paths = [pathlib.Path(path) for path in info.splits[split].filepaths]
        return Records.joined([tfrecords.records_of(path, parse) for path in paths])
    from tensorflow_datasets.core import decode

    raw = decode.DeserializeMethod.RAW_BYTES
    source = builder.as_data_source(split, deserialize_method=raw)

    def read(i: int) -> Item:
        return parse(tfrecords.parse_example(source[i]))

    return Records(len(source), read, lambda i: f"{builder.data_path}, {split} {i}")


def _check_features(folder: pathlib.Path) -> None:
    """Raise UserError if features.json names a class not of TFDS, which TFDS would import."""
    file = folder / "features.json"

    def check(pairs: list[tuple[str, Any]]) -> None:
        for key, name in pairs:
            is_class = key in ("type", "pythonClassName", "python_class_name") and name
            if is_class and isinstance(name, str) and not _FEATURE.fullmatch(name):
                raise UserError(f"{file} names {name[:80]}, which is not TFDS's")

    with reading(file):
        json.loads(file.read_bytes(), object_pairs_hook=check)


def find(
    name: str,
    data_dir: pathlib.Path,
    splits: tuple[str, str],
    num_classes: int,
    held_out: int = 0,
) -> Found:
    """A data set in TFDS's folder `data_dir`, prepared there first; UserError if it can't be.

    The names of splits may be several, joined by +; without a test split the last of `held_out`
    equal parts is one. With num_classes = 0 labels are not read.
    """
    there = _prepared(data_dir, name) or _prepare(name, data_dir)

    def opened() -> Opened:
        _check_features(there)
        try:
            builder = _import().builder_from_directory(str(there))
        except Exception as error:  # whatever a damaged folder makes TFDS raise
            raise UserError(f"{there} is no folder of TFDS: {_reason(error)}") from error
        labelled = num_classes > 0
        parts = [[_records(builder, s, labelled) for s in split.split("+")] for split in splits]
        records = [Records.joined(part) for part in parts[: 1 if held_out else 2]]
        divided = divide(records, [None] * len(records), held_out=held_out)
        return Opened(divided.train, divided.test, plain_classes(num_classes))

    files = sorted(file for file in there.iterdir() if file.is_file())
    return Found(f"TFDS's {there}", tuple(map(file_identity, files)), opened)
