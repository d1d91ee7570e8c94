"""Data sets of arrays: facts that are read from them, and their examples in the model's units."""

import dataclasses
import logging
import pathlib
from typing import Any

import numpy as np

from configs.errors import UserError
from data.batches import Data, Dataset
from data.pixels import ends
from data.spec import DataSpec
from readers.arrays import Stack, open_stacks, whole_stack
from readers.layout import Splits
from readers.source import Examples
from runtime.progress import Progress

log = logging.getLogger("soft_truncation")


@dataclasses.dataclass(frozen=True)
class _StackSource:
    """Arrays as a `Source`: floats scaled to [0, 1] by `data.scale`, padded if `data.pad`."""

    stack: Stack
    scale: tuple[Any, ...]
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.stack)

    def fetch(self, indices: np.ndarray) -> Examples:
        """The examples at these indices."""
        images = self.stack.read(indices)
        if self.scale:
            low, high = ends(self.scale)
            images = ((images.astype(np.float64) - low) / (high - low)).astype(np.float32)
        height, width = (
            (0, wanted - size) for wanted, size in zip(self.shape, images.shape[1:3], strict=False)
        )
        if height[1] or width[1]:
            images = np.pad(images, ((0, 0), height, width, (0, 0)), mode="edge")
        labels = self.stack.labels
        of = np.zeros(len(indices), np.int64) if labels is None else labels[indices]
        return {"image": images, "label": of}

    def describe(self) -> bytes:
        """The files' identity, and how their values are changed."""
        return repr((self.stack.identity, self.scale, self.shape)).encode()


def _open_stacks(spec: DataSpec) -> Splits[Stack]:
    """The arrays of a data set, with their channels last."""
    stacks = open_stacks(pathlib.Path(spec.path))
    if spec.channels_first != 1:
        return stacks
    return stacks._replace(train=stacks.train.channels_last(), test=stacks.test.channels_last())


def _looks_channels_first(shape: tuple[int, int, int]) -> bool:
    first, *others = shape
    return first < min(others) and (others[0] == others[1] or 2 * first <= min(others))


def array_facts(spec: DataSpec) -> dict[str, Any]:
    """Facts that the files at `data.path` give, by the names of fields of a config's `data`.

    All values are read once. `dequantization` is none for floats.

    Raises:
      UserError: the arrays can't be read, have values that are not finite, or do not fit
        `data.num_levels` or `data.scale`.
    """
    path = pathlib.Path(spec.path)
    train, test = _open_stacks(spec)[:2]
    height, width, channels = train.shape
    if spec.channels_first == -1 and _looks_channels_first(train.shape):
        raise UserError(
            f"data.path: {path} has examples of {train.shape}, as if channels came first: "
            "--config.data.channels_first=1, or 0 if they are pictures of "
            f"{height}×{width} with {channels} channels"
        )
    facts: dict[str, Any] = {"image_size": height, "num_channels": channels}
    facts["image_width"] = 0 if width == height else width
    progress = Progress("reading all arrays once", len(train) + len(test))
    (low, high), (_, high_test) = train.extremes(progress), test.extremes(progress)
    ranges = [f"{a:g} to {b:g}" for a, b in zip(low, high, strict=True)]
    shown = ", ".join(ranges[:8]) + (", …" if channels > 8 else "")
    axis = "first" if spec.channels_first == 1 else "last"
    log.info("%d×%d pixels of %d channels (the %s axis): %s", height, width, channels, axis, shown)
    if train.dtype.kind == "f":
        if spec.num_levels:
            raise UserError(f"data.num_levels is for whole numbers; {path} has {train.dtype}")
        read = (low, high) if channels > 1 else (low[0], high[0])
        scale = spec.scale or tuple(end.tolist() for end in read)
        if (low == high).any():
            channel = int(np.argmax(low == high))
            raise UserError(
                f"data.path: {path} has no other value than {low[channel]:g} in channel {channel}"
            )
        lows, highs = ends(scale)
        if not all(end.shape in ((), (channels,)) for end in (lows, highs)):
            raise UserError(f"data.scale is {scale}; {path} has {channels} channels")
        if not (lows < highs).all():
            raise UserError(f"data.scale is {scale}, of {path}; its first number must be smaller")
        return facts | {"scale": scale, "num_levels": 0, "dequantization": "none"}
    if spec.scale:
        raise UserError(f"data.scale is for floats; {path} has {train.dtype}")
    found = int(max(high.max(), high_test.max())) + 1
    if spec.num_levels and found > spec.num_levels:
        raise UserError(f"data.num_levels is {spec.num_levels}; {path} has the level {found - 1}")
    if low.min() == high.max():
        raise UserError(f"data.path: {path} has no other value than {low[0]:g}")
    return facts | {"num_levels": spec.num_levels or found}


def _stack_dataset(
    spec: DataSpec, stack: Stack, name: str, classes: tuple[str, ...] = ()
) -> Dataset:
    if (stack.dtype.kind == "f") != bool(spec.scale):
        kind = "floats" if spec.scale else "whole numbers"
        raise UserError(f"{name} is {stack.dtype}; this model's data are {kind}")
    if stack.shape != spec.shape:
        raise UserError(f"{name} has images of {stack.shape}, not {spec.shape}")
    source = _StackSource(stack, spec.scale, spec.padded_shape)
    return Dataset(name, source, spec.num_levels, classes)


def load_arrays(spec: DataSpec) -> Data:
    """Both splits of an array data set; UserError if they can't be read or used."""
    path = pathlib.Path(spec.path)
    train, test, classes, notes = _open_stacks(spec)
    log.info("data: arrays of %s in %s", train.dtype, path)
    for note in notes:
        log.warning("%s", note)
    splits = (_stack_dataset(spec, stack, path.stem, classes) for stack in (train, test))
    return Data(*(dataclasses.replace(split, notes=notes) for split in splits))


def array_of_images(
    spec: DataSpec, path: pathlib.Path, option: str
) -> tuple[Dataset, list[str] | None]:
    """All arrays of a file in the units of an array data set, and their labels as text, if any.

    Args:
      spec: the settings of a run on arrays.
      path: an .npy, or an .npz with `samples`, `images` or one array.
      option: the config's field that names the path, for messages.

    Raises:
      UserError: they can't be read, or their shape or kind of numbers differs from the data's.
    """
    stack = whole_stack(path, option)
    if spec.channels_first == 1 and stack.shape != spec.shape:
        stack = stack.channels_last()  # as the data are; samples have them last
    progress = Progress(f"reading {path.name}", len(stack))
    if stack.extremes(progress)[1].max() >= spec.num_levels > 0:
        raise UserError(f"{option}: {path} has levels beyond the data's {spec.num_levels}")
    labels = None if stack.labels is None else [str(label) for label in stack.labels]
    return _stack_dataset(spec, stack, path.stem), labels
