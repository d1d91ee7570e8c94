"""Flip single bits of what the program keeps; none may be read as something else.

    python -m benchmarks.bit_flips [--flips 500] [--seed 0] [--kinds checkpoint,statistics]

Half of the flips are in a random file, half in a random byte of all files. A flip is noticed if it
is an error in one line, or a warning after which the cache is made anew; it is harmless if what is
read is the same. Prints a table, and the files of flips that were read as something else. At the
end, how long checksums of 1 GiB take.
"""

import argparse
import collections
import json
import logging
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from configs.default import get_default_config
from errors import UserError
from metrics.classifier import Classifier, _read_classifier
from metrics.statistics import Statistics, load_statistics, save_statistics
from readers.cache import _Decoder, _Entry
from readers.decode import Fit
from readers.layout import Found, Opened, arrays_of
from runtime import checkpointing, environment, exported
from runtime.checksums import checksum, checksums
from runtime.workdir import PartialResults

# A kind: (writes files into a folder, reads them).
Kind = tuple[Callable[[pathlib.Path], None], Callable[[pathlib.Path], Any]]


def _params() -> Any:
    shape = jax.eval_shape(Classifier(10).init, jax.random.key(0), np.zeros((1, 8, 8, 1)))["params"]
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda s: draw.standard_normal(s.shape).astype(np.float32), shape)


def _state() -> Any:
    return {"params": _params(), "ema_params": _params(), "step": np.int32(7)}


def _make_checkpoint(folder: pathlib.Path) -> None:
    with checkpointing.checkpoints(folder, 1000) as manager:
        saver = checkpointing.Saver(manager, max_failures=1)
        saver.save(7, _state())
        saver.settle()


def _read_checkpoint(folder: pathlib.Path) -> Any:
    return checkpointing.restore(folder / "checkpoints", _state(), 7)


def _make_model(folder: pathlib.Path) -> None:
    (folder / "config.json").write_text(get_default_config().to_json_best_effort(indent=1))
    exported.write(folder, _params(), 7)


def _read_model(folder: pathlib.Path) -> Any:
    return exported.read_step(folder), exported.read(folder, _params())


def _make_statistics(folder: pathlib.Path) -> None:
    draw, dims = np.random.default_rng(0), 2048
    rows = draw.random((8, dims)).astype(np.float32)
    facts = {"num_images": 8}
    save_statistics(Statistics(facts, 8, draw.random(dims), np.eye(dims), rows), folder / "x.npz")


def _read_statistics(folder: pathlib.Path) -> Any:
    return vars(load_statistics(folder / "x.npz", {"num_images": 8}))


def _make_classifier(folder: pathlib.Path) -> None:
    from flax import serialization

    whole = {"params": _params(), "checksums": checksums(_params())}
    (folder / "x.msgpack").write_bytes(serialization.msgpack_serialize(whole))


def _read_cached_classifier(folder: pathlib.Path) -> Any:
    return _read_classifier(folder / "x.msgpack", _params())


def _entry(folder: pathlib.Path) -> tuple[_Entry, Opened, _Decoder]:
    os.environ["XDG_CACHE_HOME"] = str(folder)
    draw, fit = np.random.default_rng(0), Fit(8, 3)
    images = draw.integers(0, 256, (90, 8, 8, 3), np.uint8)
    split = arrays_of(images, draw.integers(0, 9, 90))
    opened = Opened(split, split, tuple("abcdefghi"), ("a note",))
    return _Entry("x", Found("x", (), lambda: opened), fit, False), opened, _Decoder(fit, False)


def _make_decoded(folder: pathlib.Path) -> None:
    entry, opened, decoder = _entry(folder)
    entry.write(opened, decoder)


def _read_decoded(folder: pathlib.Path) -> Any:
    decoded = _entry(folder)[0].read()
    if decoded is None:
        return None
    splits = [source.fetch(np.arange(len(source))) for source in (decoded.train, decoded.test)]
    return splits, json.dumps([decoded.classes, decoded.notes])


def _make_results(folder: pathlib.Path) -> None:
    values = {"nll": np.random.default_rng(0).random(500), "json": np.array("a text")}
    PartialResults(folder).get("x", lambda: values)


def _read_results(folder: pathlib.Path) -> Any:
    return PartialResults(folder).get("x", lambda: {})


KINDS: dict[str, Kind] = {
    "checkpoint": (_make_checkpoint, _read_checkpoint),
    "exported model": (_make_model, _read_model),
    "statistics": (_make_statistics, _read_statistics),
    "classifier": (_make_classifier, _read_cached_classifier),
    "decoded images": (_make_decoded, _read_decoded),
    "partial results": (_make_results, _read_results),
}


def _identity(value: Any) -> Any:
    texts = [leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, str)]
    arrays = jax.tree.map(lambda x: 0 if isinstance(x, str) else x, value)
    return texts, checksums(arrays)


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def flip(kind: str, flips: int, seed: int) -> tuple[collections.Counter[str], list[str]]:
    """Flip bits of a kind of file; returns (the counts of each end, what was read otherwise)."""
    (make, read), draw = KINDS[kind], random.Random(seed)
    place = pathlib.Path(tempfile.mkdtemp(prefix="flips_"))
    whole, case, counts, wrong = place / "whole", place / "case", collections.Counter[str](), []
    whole.mkdir()
    make(whole)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.stat().st_size)
    files = [path for path in files if (whole / path).is_file() and path.name != ".lock"]
    sizes = [(whole / path).stat().st_size for path in files]
    warnings = _Warnings()
    logging.getLogger("soft_truncation").addHandler(warnings)
    same = _identity(read(pathlib.Path(shutil.copytree(whole, case))))
    assert not warnings.count, f"{kind}: a warning of what is whole"
    for number in range(flips):
        shutil.rmtree(case)
        shutil.copytree(whole, case)
        chosen = draw.choice(files) if number % 2 else draw.choices(files, sizes)[0]
        data = bytearray((case / chosen).read_bytes())
        bit = draw.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        (case / chosen).write_bytes(data)
        warnings.count = 0
        try:
            value = read(case)
        except UserError:
            counts["noticed"] += 1
            continue
        if warnings.count:
            counts["noticed"] += 1
        elif _identity(value) == same:
            counts["harmless"] += 1
        else:
            counts["wrong"] += 1
            wrong.append(f"{kind}: bit {bit} of {chosen}")
    logging.getLogger("soft_truncation").removeHandler(warnings)
    shutil.rmtree(place)
    return counts, wrong


def main() -> None:
    """Flip bits of the kinds of the command line; the exit status is 0 if all were noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kinds", default=",".join(KINDS), help="names, divided by commas")
    parser.add_argument("--flips", type=int, default=500, help="for each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    environment.prepare()
    logging.getLogger("soft_truncation").propagate = False
    every: list[str] = []
    print("| kind | flips | noticed | harmless | read as something else |")
    print("|---|---|---|---|---|")
    for kind in options.kinds.split(","):
        counts, wrong = flip(kind, options.flips, options.seed)
        numbers = " | ".join(str(counts[name]) for name in ("noticed", "harmless", "wrong"))
        print(f"| {kind} | {options.flips} | {numbers} |", flush=True)
        every += wrong
    print("\n".join(every))
    array = np.ones(2**28, np.float32)
    start = time.perf_counter()
    checksum(array)
    print(f"a checksum of 1 GiB takes {time.perf_counter() - start:.2f} s")
    sys.exit(bool(every))


if __name__ == "__main__":
    main()
