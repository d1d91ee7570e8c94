"""Image files in folders, zip and tar archives, with or without splits and classes."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.errors import UserError
from data.labels import folder_labels
from readers import containers, layout
from readers.decode import is_image_name
from readers.splits import choose_splits, common_folder, divide

_LABELS = "dataset.json"


def records_of(container: containers.Container, names: Sequence[str]) -> layout.Records:
    """Records of some of a container's files, in the order of the names, without labels."""
    place = None
    if container.in_order:
        number = {name: i for i, name in enumerate(container.files)}
        place = np.array([number[name] for name in names])
    return layout.Records(
        len(names),
        lambda i: (container.read(names[i]), 0),
        lambda i: f"{container.path}/{names[i]}",
        place=place,
    )


class Part:
    """The image files of a split, or of a data set without splits."""

    def __init__(self, container: containers.Container, prefix: str = "") -> None:
        """The images whose names begin with `prefix`."""
        every = container.names()
        self.container = container
        self.names = [name for name in every if is_image_name(name) and name.startswith(prefix)]
        self.root = prefix + common_folder([name.removeprefix(prefix) for name in self.names])
        # A dataset.json in a folder that contains all images.
        files = (name for name in every if name.split("/")[-1] == _LABELS)
        self._file = next((f for f in files if self.root.startswith(f[: -len(_LABELS)])), None)

    def check(self, least: int = 1, why: str = "", option: str = "data.path") -> None:
        """Raise UserError if there are fewer images; `option` is the config's field of the path."""
        where = f"{option}: {self.container.path}/{self.root}".rstrip("/")
        if not self.names:
            every = containers.instead([*self.container.names(), *self.container.skipped])
            raise UserError(f"{where} has no images{every}")
        if len(self.names) < least:
            raise UserError(
                f"{where} has {len(self.names)} images; {least} or more are needed{why}"
            )

    def labels(self, classes: int | None = None, many: bool = False) -> tuple[Any, str]:
        """(the label of each image, None if there are none; a sentence if that may surprise).

        Args:
          classes: how many class folders there must be; 0: no labels; None: any.
          many: as of `folder_labels`.
        """
        if classes == 0:
            return None, ""
        if self._file is not None:
            return self._edm_labels(self._file), ""
        below = [name.removeprefix(self.root) for name in self.names]
        folders, note = folder_labels(below, many or bool(classes))
        if classes and len(set(folders or [])) != classes:
            raise UserError(
                f"{self.container.path}/{self.root} must have {classes} class folders; it has "
                f"{', '.join(sorted(set(folders or []))[:12]) or 'none'}"
            )
        return folders, note

    def _edm_labels(self, file: str) -> list[int] | None:
        """Labels in dataset.json, the format of EDM's and StyleGAN's dataset_tool.py."""
        where = f"{self.container.path}/{file}"
        by_name: dict[str, int] = {}
        try:
            given = json.loads(self.container.read(file)).get("labels")
            for name, label in given or ():
                if type(label) is not int or not 0 <= label < 2**63:
                    raise ValueError(f"the label {label!r} of {name} is no whole number from 0 on")
                if by_name.setdefault(name, label) != label:
                    raise ValueError(f"it has the labels {by_name[name]} and {label} for {name}")
        except Exception as error:  # what is damaged raises any kind of error
            raise UserError(f"{where} can't be understood: {str(error)[:200]}") from error
        if given is None:
            return None
        names = [name.removeprefix(file.removesuffix(_LABELS)) for name in self.names]
        missing = [name for name in names if name not in by_name]
        if missing:
            raise UserError(
                f"{where} has no label for {missing[0]} ({len(missing)} of {len(names)} lack one)"
            )
        return [by_name[name] for name in names]


def _is_used(name: str) -> bool:
    return is_image_name(name) or name.split("/")[-1] == _LABELS


def _open(
    parts: Sequence[Part], classes: int | None, many: bool, held_out: int = 0, note: str = ""
) -> layout.Opened:
    """Both splits of image files, or all of them, as `divide` takes them."""
    for part in parts:
        if len(parts) == 1:
            part.check(held_out or 10, ", since some are held out for testing")
        part.check()
    labels, dropped = zip(*(part.labels(classes, many) for part in parts), strict=True)
    records = [records_of(part.container, part.names) for part in parts]
    divided = divide(records, labels, dropped=dropped, held_out=held_out)
    left = [text for part in parts for text in part.container.passed_over(_is_used)]
    notes = dict.fromkeys([*filter(None, [note]), *divided.notes, *left])
    return layout.Opened(*divided[:3], tuple(notes))


def _many(holders: Sequence[containers.Container], many: bool) -> bool:
    """`many`, if it makes a difference; otherwise decoded images are the same."""
    folders = (len({n.rpartition("/")[0] for n in holder.names()}) for holder in holders)
    return many and max(folders) > 100


def find_splits(
    path: pathlib.Path,
    classes: int | None = None,
    prefix: str = "",
    what: str = "images",
    many: bool = False,
) -> layout.Found | None:
    """Image files in train/ and test/ (val/, valid/, …), each a folder or an archive.

    `path` is the folder or archive that has both; `classes` and `many` are as of `Part.labels`;
    the splits' names may begin with `prefix`; `what` is a name for the images in the log.
    """
    places: dict[str, pathlib.Path] = {}
    if path.is_dir():
        entries = sorted(p for p in path.iterdir() if not containers.is_hidden(p.name))
        packed = [p for p in entries if p.is_dir() or containers.is_archive_name(p.name)]
        places = {containers.archive_stem(p.name): p for p in packed}
        loose = [p.name for p in entries if p.is_file() and is_image_name(p.name)]
        names = [name for name in places if name.startswith(prefix)] or [*places]
        names += loose[:1]
    else:
        container = containers.open_container(path)
        files = [name for name in container.names() if is_image_name(name)]
        root = common_folder(files)
        names = sorted({name.removeprefix(root).split("/")[0] for name in files})
    # A folder with many entries has no splits.
    chosen = choose_splits(names, str(path)) if path.is_dir() or len(names) <= 8 else None
    if chosen is None:
        return None
    if places:
        holders = [containers.open_container(places[name]) for name in chosen]
        identity, prefixes = tuple(holder.identity() for holder in holders), ("", "")
    else:
        holders, identity = [container] * 2, (container.identity(),)
        prefixes = (f"{root}{chosen[0]}/", f"{root}{chosen[1]}/")

    def opened() -> layout.Opened:
        return _open(list(map(Part, holders, prefixes)), classes, many)

    names = [places[name].name if places else name for name in chosen]
    splits = f"{what} in {path}, splits {' and '.join(names)}"
    return layout.Found(splits, (*identity, classes, _many(holders, many)), opened)


def find_unsplit(
    path: pathlib.Path,
    classes: int | None = None,
    note: str = "",
    many: bool = False,
    held_out: int = 0,
    what: str = "every tenth held out",
) -> layout.Found:
    """Image files in a folder or an archive without splits.

    Labels are read from dataset.json, as in EDM's and StyleGAN's zips; without it, folders may be
    classes.

    Args:
      path: the folder or archive.
      classes, many: as of `Part.labels`.
      note: a sentence for the log and the report.
      held_out: as of `divide`.
      what: says which images are held out.
    """
    container = containers.open_container(path)
    known = (what,) if held_out else (classes, _many([container], many), "every tenth")
    return layout.Found(
        f"image files {path}, {what}",
        (container.identity(), *known),
        lambda: _open([Part(container)], classes, many, held_out, note),
    )
