"""Damage files of each format that the program reads; each must be read, or refused in one line.

    python -m benchmarks.fuzz [--formats pth,npz] [--seconds 3600] [--seed 0]

Bytes are changed, cut, doubled and set to extreme numbers, in members of archives too. A child
process reads one damaged file after the other, with 4 GiB of memory. Wrong are: an exception that
is no UserError, a message of several lines, a crash, a read of more than 20 seconds, and a file
that appears outside. Prints a table, and each file that was wrong.
"""

import argparse
import collections
import functools
import io
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import numpy as np
from PIL import Image

import datasets
from configs import saved
from configs.default import get_default_config
from configs.validate import validate
from errors import UserError
from metrics.statistics import Statistics, load_statistics, save_statistics
from official.pth_reader import read_pth
from official.pth_writer import write_pth
from readers.arrays import whole_stack
from readers.samples import load_images
from runtime import exported
from runtime.metrics_log import Metrics
from runtime.pictures import plot_training

_MEMORY = 4 * 2**30
_SECONDS_A_FILE = 20
_NUMBERS = (0, 1, 0x7F, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 10**12, 2**63 - 1)

# A format: (writes files into a folder, reads them).
Format = tuple[Callable[[pathlib.Path], Any], Callable[[pathlib.Path], Any]]


def _arrays(folder: pathlib.Path, kind: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), np.uint8)
    path = folder / f"x.{kind}"
    if kind == "npy":
        np.save(path, images)
    else:
        np.savez(path, samples=images, labels=np.arange(9))


def _read_samples(folder: pathlib.Path, kind: str) -> None:
    source, *_ = load_images(folder / f"x.{kind}", 8, 1, "eval.samples")
    source.fetch(np.arange(4))


def _read_stack(folder: pathlib.Path, kind: str) -> None:
    whole_stack(folder / f"x.{kind}", "data.path")


def _pngs(folder: pathlib.Path) -> None:
    draw = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(draw.integers(0, 256, (8, 8), np.uint8)).save(folder / f"{i}.png")
    pairs = [[f"{i}.png", i % 2] for i in range(6)]
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))


def _read_pngs(folder: pathlib.Path) -> None:
    source, *_ = load_images(folder, 8, 1, "eval.samples")
    source.fetch(np.arange(4))


_SHAPES = {"Conv_0": {"kernel": (3, 3, 1, 8), "bias": (8,)}}


def _model(folder: pathlib.Path) -> None:
    shape = jax.tree.map(np.ones, _SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    exported.write(folder, shape, 7)


def _read_model(folder: pathlib.Path) -> None:
    exported.read_step(folder)
    exported.read(folder, jax.tree.map(np.ones, _SHAPES, is_leaf=lambda x: isinstance(x, tuple)))


def _pth(folder: pathlib.Path) -> None:
    tree = {"model": {"a.weight": np.ones((3, 4), np.float32)}, "step": 3, "ema": [1.0, None]}
    write_pth(folder / "x.pth", tree)


def _statistics(folder: pathlib.Path) -> None:
    draw, dims = np.random.default_rng(0), 2048
    mean, rows = draw.random(dims), draw.random((8, dims)).astype(np.float32)
    save_statistics(Statistics({"a": 1}, 8, mean, np.eye(dims), rows), folder / "x.npz")


def _config(folder: pathlib.Path) -> None:
    (folder / "config.json").write_text(get_default_config().to_json_best_effort(indent=1))


def _read_config(folder: pathlib.Path) -> None:
    from build import REGISTRIES

    validate(saved.get_config(folder), 1, REGISTRIES)


def _metrics(folder: pathlib.Path) -> None:
    rows = [{"step": i, "loss": 1.0 / i, "tau": 0.1} for i in range(1, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_metrics(folder: pathlib.Path) -> None:
    Metrics(folder, 15).close()
    plot_training(folder / "metrics.jsonl", folder / "training.png")


def _data_set(layout: str) -> Format:
    def write(folder: pathlib.Path) -> None:
        from tests import make_datasets

        made = make_datasets.LAYOUTS[layout](folder)
        options = {k.removeprefix("data."): v for k, v in made.options.items() if "data." in k}
        told = {"dataset": made.dataset, "path": str(made.path.relative_to(folder))} | options
        (folder.parent / "told.json").write_text(json.dumps(told))

    def read(folder: pathlib.Path) -> None:
        config = get_default_config()
        told = json.loads((folder.parent / "told.json").read_text())
        config.data.update(told | {"path": str(folder / told["path"]), "cache": False})
        if "tfrecords_path" in told:
            config.data.update(tfrecords_path=str(folder / told["path"]), path="")
        data = datasets.load_data(config)
        datasets.in_order(data.train)

    return write, read


def _get_formats() -> dict[str, Format]:
    formats: dict[str, Format] = {
        "pth": (_pth, lambda folder: read_pth(folder / "x.pth")),
        "safetensors": (_model, _read_model),
        "npz": (
            functools.partial(_arrays, kind="npz"),
            functools.partial(_read_samples, kind="npz"),
        ),
        "npy": (functools.partial(_arrays, kind="npy"), functools.partial(_read_stack, kind="npy")),
        "npz stack": (
            functools.partial(_arrays, kind="npz"),
            functools.partial(_read_stack, kind="npz"),
        ),
        "PNG folder": (_pngs, _read_pngs),
        "statistics": (_statistics, lambda folder: load_statistics(folder / "x.npz", {"a": 1})),
        "config.json": (_config, _read_config),
        "metrics.jsonl": (_metrics, _read_metrics),
    }
    layouts = {
        "TFRecord": "celebahq_tfrecords",
        "IDX": "fashion_mnist_raw",
        "IDX gz": "fashion_mnist_gz",
        "CIFAR-10 tar.gz": "cifar10_python_tar",
        "SVHN mat": "svhn_mat",
        "STL-10 tar": "stl10_tar",
        "zip": "plain_zip",
        "tar": "plain_tar",
        "CelebA zip": "celeba_zip",
        "EDM zip": "edm_zip",
        "LSUN lmdb": "lsun_lmdb",
        "Parquet": "parquet_hub",
    }
    return formats | {name: _data_set(layout) for name, layout in layouts.items()}


FORMATS = _get_formats()


def damage(draw: random.Random, data: bytes) -> bytes:
    """Change a few places of a file."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        size = max(len(changed), 1)
        place, length = draw.randrange(size), draw.choice((1, 2, 4, 8, 64, 1024))
        # Headers are where it matters.
        place = draw.randrange(min(size, 256)) if draw.random() < 0.5 else place
        kind = draw.randrange(7)
        if kind == 0 and changed:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place : place + length] = draw.randbytes(length)
        elif kind == 2:
            number = draw.choice(_NUMBERS)
            width = draw.choice((1, 2, 4, 8))
            order = draw.choice(("little", "big"))
            changed[place : place + width] = (number % 256**width).to_bytes(width, order)
        elif kind == 3:
            del changed[place : place + length]
        elif kind == 4:
            changed[place:place] = changed[place : place + length]
        elif kind == 5:
            text = draw.choice((b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'""', b"1" * 30))
            changed[place : place + len(text)] = text
        else:
            del changed[place:]
    return bytes(changed)


def damage_archive(draw: random.Random, data: bytes) -> bytes:
    """Change a member of a zip archive, its name or its size, and leave the archive whole."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    names = source.namelist()
    hit = draw.choice(names)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            content, to = source.read(name), name
            if name == hit:
                kind = draw.randrange(8)
                if kind == 0:
                    to = draw.choice(("../", "/nowhere/../", "a/../../", "..\\")) + name
                elif kind == 1:
                    continue
                elif kind == 2 and draw.random() < 0.1:
                    content = bytes(64 * 2**20)  # a small bomb
                else:
                    content = damage(draw, content)
            archive.writestr(to, content)
    return target.getvalue()


def _spoil(draw: random.Random, folder: pathlib.Path) -> str:
    """Damage one file of a folder; returns its name."""
    path = draw.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    data = path.read_bytes()
    is_zip = data[:2] == b"PK" and draw.random() < 0.6
    path.write_bytes(damage_archive(draw, data) if is_zip else damage(draw, data))
    return path.name


def _try_one(read: Callable[[pathlib.Path], Any], folder: pathlib.Path) -> tuple[str, str]:
    """(read, refused or wrong; what was wrong)."""
    try:
        read(folder)
    except UserError as error:
        lines = len(str(error).splitlines())
        return ("refused", "") if lines == 1 else ("wrong", f"{lines} lines: {error}")
    except BaseException:
        return "wrong", traceback.format_exc()
    return "read", ""


def _in_child(
    form: Format, place: pathlib.Path, whole: pathlib.Path, seed: int, end: float
) -> None:
    taken = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, taken + _MEMORY))

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"longer than {_SECONDS_A_FILE} seconds")

    signal.signal(signal.SIGALRM, too_long)
    with (place / "results.jsonl").open("a") as file:
        while time.time() < end:
            draw = random.Random(seed)
            folder = place / "case"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            (place / "seed").write_text(str(seed))
            name = _spoil(draw, folder)
            signal.alarm(_SECONDS_A_FILE)
            kind, what = _try_one(form[1], folder)
            signal.alarm(0)
            file.write(json.dumps({"seed": seed, "file": name, "kind": kind, "what": what}) + "\n")
            file.flush()
            seed += 1


def fuzz(form: Format, seconds: float, seed: int) -> tuple[collections.Counter[str], list[str]]:
    """Read damaged files for so long; returns (the counts of each end, what was wrong)."""
    counts, wrong = collections.Counter[str](), []
    place = pathlib.Path(tempfile.mkdtemp(prefix="fuzz_"))
    whole = place / "whole"
    whole.mkdir()
    form[0](whole)
    form[1](shutil.copytree(whole, place / "case"))  # what is not damaged is read
    outside = {path.name for path in place.iterdir()} | {"results.jsonl", "seed", "cache"}
    end = time.time() + seconds
    while time.time() < end:
        child = os.fork()
        if not child:
            status = 1
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 2)
                _in_child(form, place, whole, seed, end)
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            seed = int((place / "seed").read_text())
            counts["crash"] += 1
            wrong.append(f"seed {seed}: the reader died with {os.waitstatus_to_exitcode(status)}")
            seed += 1
    for line in (place / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        counts[row["kind"]] += 1
        if row["kind"] == "wrong":
            wrong.append(f"seed {row['seed']}, {row['file']}: {row['what']}")
    for path in {path.name for path in place.iterdir()} - outside:
        wrong.append(f"{path} was written outside")
    shutil.rmtree(place)
    return counts, wrong


def main() -> None:
    """Fuzz the formats of the command line; the exit status is 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--formats", default="all", help="names, divided by commas")
    parser.add_argument("--seconds", type=float, default=60, help="for each format")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fuzz_cache_")
    failed = 0
    lines = ["| format | files | read | refused | wrong | crashes |", "|---|---|---|---|---|---|"]
    for name in FORMATS if options.formats == "all" else options.formats.split(","):
        counts, wrong = fuzz(FORMATS[name], options.seconds, options.seed)
        kinds = ("read", "refused", "wrong", "crash")
        numbers = " | ".join(str(counts[kind]) for kind in kinds)
        lines.append(f"| {name} | {sum(counts.values())} | {numbers} |")
        print(lines[-1], flush=True)
        seen = set()
        for text in wrong:
            last = text.strip().splitlines()[-1]
            if last not in seen:
                seen.add(last)
                print(f"WRONG, {name}, {text}", flush=True)
        failed += len(wrong)
    print("\n" + "\n".join(lines))
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
