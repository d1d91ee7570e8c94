"""CelebA: aligned photographs, and the file that divides them into splits."""

import csv
import pathlib

import numpy as np

from configs.errors import UserError
from readers.containers import Container, file_identity, open_container
from readers.decode import is_image_name
from readers.image_files import find_unsplit, records_of
from readers.layout import Found, Opened, Records

_IMAGES = "img_align_celeba"
_PARTITIONS = ("list_eval_partition.txt", "list_eval_partition.csv")
_NOTE = (
    "there is no list_eval_partition.txt, so that every tenth image is a test image: bits/dim do "
    "not compare with published ones"
)


def _read_partition(path: pathlib.Path) -> dict[str, str]:
    """Image name → "0" (training), "1" (validation) or "2" (test)."""
    parts: dict[str, str] = {}
    text = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(text, start=1):
        fields = next(csv.reader([line])) if path.suffix == ".csv" else line.split()
        if not fields or fields[0] == "image_id":
            continue
        if len(fields) != 2 or fields[1].strip() not in ("0", "1", "2"):
            raise UserError(
                f"{path}, line {number}: {line[:60]!r} is not an image's name and 0, 1 or 2"
            )
        parts[fields[0]] = fields[1].strip()
    return parts


def _open(container: Container, partition: pathlib.Path) -> Opened:
    parts = _read_partition(partition)
    names = {n.split("/")[-1]: n for n in container.names() if is_image_name(n)}
    missing, unknown = sorted(parts.keys() - names.keys()), sorted(names.keys() - parts.keys())
    if missing or unknown:
        example = f"no {missing[0]}" if missing else f"{unknown[0]}, which the file does not name"
        raise UserError(
            f"{partition} names {len(parts)} images, and {container.path} has {len(names)} and "
            f"{example}; they do not belong together"
        )

    def part(wanted: str) -> Records:
        chosen = [names[name] for name in sorted(names) if parts[name] == wanted]
        if not chosen:
            raise UserError(f"{partition} has no image of part {wanted}")
        return records_of(container, chosen).subset(np.arange(len(chosen)))

    return Opened(part("0"), part("2"))


def find(path: pathlib.Path) -> Found | None:
    """CelebA's zip or folder of photographs, or the parent folder, and its partition file."""
    candidates = [path / _IMAGES, path / f"{_IMAGES}.zip"] if path.is_dir() else []
    images = next((place for place in candidates if place.exists()), path)
    if images == path and path.is_dir() and not any(is_image_name(p.name) for p in path.iterdir()):
        return None
    container = open_container(images)
    places = [folder / name for folder in (path, images.parent) for name in _PARTITIONS]
    partition = next((place for place in places if place.is_file()), None)
    if partition is None:
        return find_unsplit(images, classes=0, note=_NOTE)
    return Found(
        f"the authors' photographs {images}, split by {partition.name}",
        (container.identity(), file_identity(partition)),
        lambda: _open(container, partition),
    )
