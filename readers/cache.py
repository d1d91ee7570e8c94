"""A cache of images, decoded once at the size of training and read as memory-mapped arrays.

An entry is a folder in the user's cache with the images and labels of both splits, and facts.json.
It is written under another name and renamed when it is complete, so that an interruption leaves no
incomplete entry.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import pathlib
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import xxhash

from configs import saved
from configs.errors import UserError
from readers.decode import Fit, has_16_bits, is_grey, open_image
from readers.layout import Arrays, Found, Item, Opened, Records, Splits
from readers.source import ArraySource, Examples, RecordSource, Source
from runtime import environment
from runtime.ahead import in_threads
from runtime.checksums import checksum, is_of
from runtime.locking import waiting_lock
from runtime.progress import Progress

log = logging.getLogger("soft_truncation")

_FORMAT = 2  # version of an entry's format; entries of other versions are not read
_CHECKED_AT_ONCE = 2**30  # bytes; the checksum of larger images is checked in the background
_READ_AHEAD = 64  # images
_BLOCK = 256  # images

Block = tuple[np.ndarray, np.ndarray]  # images (n, H, W, C) uint8, labels (n,) int64
Decoded = Splits[Source]  # whose images have the size and channels of training


def _read(records: Records, i: int) -> Item | Exception | None:
    """An item that must be read in its turn, or the error; None: threads read it."""
    if records.place is None:
        return None
    try:
        return records.read(i)
    except Exception as error:  # a damaged archive can raise any kind of error
        return error


class _Decoder:
    """Decodes records in threads, and counts sizes, grey images and unreadable files."""

    def __init__(self, fit: Fit, skip_unreadable: bool) -> None:
        self._fit, self._skip = fit, skip_unreadable
        self.problems: list[str] = []
        self.sizes: collections.Counter[tuple[int, int]] = collections.Counter()
        self.num_grey = self.highest = 0

    def _decode(self, source: RecordSource, i: int, item: Any) -> Any:
        """(i, image, label) of a record, or what is wrong with it; `item`: as of `_read`."""
        try:
            if isinstance(item, Exception):
                raise item
            fitted, label, image = source.read(i, item)
        except UserError:
            raise
        except Exception as error:  # PIL raises many kinds of error for damaged images
            return f"{source.records.name(i)} ({str(error) or type(error).__name__})"
        self.sizes[image.size] += 1
        self.num_grey += is_grey(image)
        if has_16_bits(image):
            self.highest = max(self.highest, int(np.asarray(image).max()))
        return i, fitted, label

    def items(self, records: Records) -> Iterator[tuple[int, np.ndarray, int]]:
        """(index, image, label) of each readable record, in order; others go to `problems`."""
        source = RecordSource(records, self._fit, max_pixels=self._fit.max_pixels)
        progress = Progress("decoding images", len(records))
        every = ((i, _read(records, i)) for i in range(len(records)))
        for found in in_threads(
            lambda read: self._decode(source, *read), every, os.cpu_count() or 1, _READ_AHEAD
        ):
            progress.advance(1)
            if isinstance(found, str):
                self.problems.append(found)
            else:
                yield found

    def blocks(self, split: Records | Arrays) -> Iterator[Block]:
        """Yield all images in order, in blocks; those that can't be read go to `problems`."""
        return self._of_records(split) if isinstance(split, Records) else self._of_arrays(split)

    def _of_records(self, records: Records) -> Iterator[Block]:
        items = self.items(records)
        while part := list(itertools.islice(items, _BLOCK)):
            _, images, labels = zip(*part, strict=True)
            yield np.stack(images), np.array(labels, np.int64)

    def _of_arrays(self, arrays: Arrays) -> Iterator[Block]:
        progress = Progress("decoding images", 0)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for images, labels in arrays.blocks():
                progress.advance(len(images))
                ready = self._fit.batch(images)
                if ready is not None:
                    yield ready, labels
                    continue
                for start in range(0, len(images), _BLOCK):
                    part = slice(start, start + _BLOCK)
                    fitted = pool.map(lambda image: self._fit(open_image(image)), images[part])
                    yield np.stack(list(fitted)), labels[part]

    def check(self) -> None:
        """Log a summary; UserError if images can't be read and `skip_unreadable` is off."""
        readable, unreadable = sum(self.sizes.values()), len(self.problems)
        if self.problems and not self._skip:
            raise UserError(
                f"{unreadable} of {readable + unreadable} files in data.path are no readable "
                f"images, the first of them {self.problems[0]}; mend or remove them, or set "
                "data.skip_unreadable=True"
            )
        for problem in self.problems:
            log.warning("left out: %s is not a readable image", problem)
        if self.sizes:
            small, large = min(self.sizes, key=min), max(self.sizes, key=min)
            counts = readable, *small, *large, self.num_grey
            log.info("%d images of %d × %d to %d × %d pixels, %d of them grey", *counts)
        if 0 < self.highest < 2**15:
            log.warning(
                "the highest value of the images of 16 bits is %d of 65535: they are dark, and "
                "should be scaled before",
                self.highest,
            )


def _is_at_hand(split: Records | Arrays, fit: Fit) -> bool:
    """Whether a split needs no cache: it is small, and has the size of training."""
    return (
        isinstance(split, Arrays)
        and split.is_single
        and fit.batch(next(split.blocks())[0][:1]) is not None
    )


def _in_memory(split: Records | Arrays, fit: Fit, decoder: _Decoder) -> ArraySource:
    parts = list(decoder.blocks(split))
    if len(parts) == 1:
        return ArraySource(*parts[0])
    empty = np.zeros((0, fit.size, fit.size, fit.channels), np.uint8), np.zeros(0, np.int64)
    images, labels = (np.concatenate(arrays) for arrays in zip(empty, *parts, strict=True))
    return ArraySource(images, labels)


@dataclasses.dataclass(frozen=True)
class _Watched(ArraySource):
    """Images of an entry that a thread compares with their checksum; others are given up."""

    damage: list[str] = dataclasses.field(default_factory=list)

    def fetch(self, indices: np.ndarray) -> Examples:
        """The examples at these indices; UserError once the images are known to be damaged."""
        if self.damage:
            raise UserError(self.damage[0])
        return super().fetch(indices)

    def look(self, folder: pathlib.Path, known: str) -> None:
        """Compare the images with the checksum that is known of them."""
        if not is_of(known, self.images):
            (folder / "facts.json").unlink(missing_ok=True)
            self.damage.append(
                f"{folder} is damaged; run the same command again: it decodes the images anew"
            )
            log.error(self.damage[0])


def _checksum_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class _Entry:
    """A data set's folder in the cache."""

    def __init__(self, name: str, found: Found, fit: Fit, skip_unreadable: bool) -> None:
        key = repr((_FORMAT, found.identity, fit, skip_unreadable))
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        self._fit = fit
        self.folder = environment.cache_dir() / "data" / f"{name}_{fit.size}_{digest}"

    def read(self) -> Decoded | None:
        """Read the entry; None if it does not exist or is damaged."""
        try:
            facts = saved.read_object(self.folder / "facts.json")
            if facts.pop("checksum") != _checksum_of(facts):
                raise ValueError("facts.json is damaged")
            train, test = (self._read_split(name, facts[name]) for name in ("train", "test"))
        except Exception as error:  # a damaged file can raise any kind of error
            if self.folder.exists():
                log.warning("%s is damaged (%s) and is made anew", self.folder, error)
                shutil.rmtree(self.folder, ignore_errors=True)
            return None
        return Decoded(train, test, tuple(facts["classes"]), tuple(facts["notes"]))

    def _read_split(self, name: str, facts: dict[str, Any]) -> ArraySource:
        shape = (facts["count"], self._fit.size, self._fit.size, self._fit.channels)
        path = self.folder / f"{name}.uint8"
        if path.stat().st_size != np.prod(shape):
            raise ValueError(f"{path.name} has another size")
        images = np.memmap(path, np.uint8, "r", shape=shape)
        labels = np.load(self.folder / f"{name}_labels.npy")
        source = ArraySource(images, labels, bytes.fromhex(facts["digest"]))
        of_images, of_labels = facts["checksums"]
        if not is_of(of_labels, labels):
            raise ValueError(f"the labels of {name} are damaged")
        if images.nbytes > _CHECKED_AT_ONCE:
            watched, of = _Watched(**vars(source)), (self.folder, of_images)
            threading.Thread(None, watched.look, f"compare {path}", of, daemon=True).start()
            return watched
        if not is_of(of_images, images):
            raise ValueError(f"{path.name} is damaged")
        return source

    def write(self, opened: Opened, decoder: _Decoder) -> None:
        """Decode both splits into the folder; OSError if the disk is full."""
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            facts: dict[str, Any] = {"classes": opened.classes, "notes": opened.notes}
            for name, split in (("train", opened.train), ("test", opened.test)):
                facts[name] = _write_split(partial, name, decoder.blocks(split))
            decoder.check()
            facts["checksum"] = _checksum_of(facts)
            (partial / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
            partial.replace(self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write_split(folder: pathlib.Path, name: str, blocks: Iterator[Block]) -> dict[str, Any]:
    digest, check, labels = hashlib.sha256(), xxhash.xxh3_128(), []
    with (folder / f"{name}.uint8").open("wb") as file:
        for images, of_images in blocks:
            data = images.tobytes()
            digest.update(data)
            check.update(data)
            file.write(data)
            labels.append(of_images)
        file.flush()
        os.fsync(file.fileno())
    every = np.concatenate([np.zeros(0, np.int64), *labels])
    np.save(folder / f"{name}_labels.npy", every)
    checks = [check.hexdigest(), checksum(every)]
    return {"count": len(every), "digest": digest.hexdigest(), "checksums": checks}


def decode(
    name: str, found: Found, fit: Fit, skip_unreadable: bool = False, keep: bool = True
) -> Decoded:
    """Both splits of a data set that a reader found, at the size of training.

    Arrays of the right size, up to 1 GiB, stay in memory. Other data are decoded once into the
    cache and memory-mapped from there; if the cache has no room or `keep` is off, files are read
    and decoded when they are needed.

    Args:
      name: the data set's name, for the cache.
      found, fit: the result of a reader, and what converts an image to the size of training.
      skip_unreadable: leave out images that can't be read, instead of raising a UserError.
      keep: whether to use the cache.
    """
    entry = _Entry(name, found, fit, skip_unreadable)
    if keep and (kept := entry.read()):
        log.info("decoded images: %s", entry.folder)
        return kept
    opened = found.open()
    decoder = _Decoder(fit, skip_unreadable)
    at_hand = all(_is_at_hand(split, fit) for split in (opened.train, opened.test))
    if keep and not at_hand and _fits_on_disk(opened, fit, entry.folder):
        try:
            entry.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = entry.folder.with_name(f"{entry.folder.name}.lock")
            with waiting_lock(lock, "another process is decoding these images"):
                if not entry.folder.exists():
                    entry.write(opened, decoder)
            kept = entry.read()
            if kept:
                log.info("decoded images are kept in %s", entry.folder)
                return kept
        except OSError as error:
            log.warning(
                "decoded images can't be kept in %s (%s); files are read as they are needed",
                entry.folder.parent,
                error.strerror or error,
            )
    return _not_kept(found, opened, fit, skip_unreadable)


def _fits_on_disk(opened: Opened, fit: Fit, folder: pathlib.Path) -> bool:
    """Whether the images take at most half of the free disk space; if not, logs a warning."""
    count = sum(len(split) for split in opened[:2] if isinstance(split, Records))
    while not folder.exists():
        folder = folder.parent
    needed, free = count * fit.size**2 * fit.channels, shutil.disk_usage(folder).free
    if needed <= free // 2:
        return True
    take = f"decoded images would take {needed / 1e9:.0f} GB of the free {free / 1e9:.0f} GB"
    log.warning("%s: files are read and decoded as they are needed", take)
    return False


def _not_kept(found: Found, opened: Opened, fit: Fit, skip_unreadable: bool) -> Decoded:
    decoder = _Decoder(fit, skip_unreadable)

    def source(name: str, split: Records | Arrays) -> Source:
        if not isinstance(split, Records) or split.place is not None:
            return _in_memory(split, fit, decoder)
        if skip_unreadable:  # all are decoded to find out
            split = split.subset(np.array([i for i, *_ in decoder.items(split)], int))
        identity = repr((name, found.identity)).encode()
        return RecordSource(split, fit, identity, fit.max_pixels)

    train, test = source("train", opened.train), source("test", opened.test)
    decoder.check()
    return Decoded(train, test, opened.classes, opened.notes)
