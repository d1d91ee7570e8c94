"""Flip single bits of what the program keeps; none may be read as something else.

    python -m tests.stress.bit_flips [--flips 500] [--seed 0] [--formats checkpoint statistics]

Half of the flips are in a random file, half in a random byte of all files. A flip is noticed if it
is an error in one line, or a warning after which the cache is made anew; it is harmless if what is
read is the same. Prints a table, and the files of flips that were read as something else. At the
end, how long checksums of 1 GiB take.
"""

import argparse
import collections
import logging
import pathlib
import random
import shutil
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks.measure import Table
from configs.errors import UserError
from runtime import environment
from runtime.checksums import checksum, checksums
from tests.stress.formats import KEPT


def identity(value):
    """What is equal for equal values of arrays and texts."""
    texts = [leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, str)]
    return texts, checksums(jax.tree.map(lambda x: 0 if isinstance(x, str) else x, value))


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record):
        self.count += 1


def flip_one(draw, folder, files):
    """Flip a bit, of one of the files or of all their bytes; returns where."""
    sizes = [(folder / path).stat().st_size for path in files]
    chosen = draw.choice([draw.choice(files), *draw.choices(files, sizes)])
    data = bytearray((folder / chosen).read_bytes())
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    (folder / chosen).write_bytes(data)
    return f"bit {bit} of {chosen}"


def flip(name, flips, seed):
    """Flip bits of a format; returns (the counts of each end, what was read otherwise)."""
    (write, read), draw = KEPT[name], random.Random(seed)
    counts, wrong, warnings = collections.Counter(), [], Warnings()
    logging.getLogger("soft_truncation").addHandler(warnings)
    with tempfile.TemporaryDirectory(prefix="flips_") as place:
        whole, case = pathlib.Path(place) / "whole", pathlib.Path(place) / "case"
        whole.mkdir()
        write(whole)
        paths = (p for p in sorted(whole.rglob("*")) if p.is_file() and p.name != ".lock")
        files = [path.relative_to(whole) for path in paths if path.stat().st_size]
        same = identity(read(shutil.copytree(whole, case)))
        assert not warnings.count, f"{name}: a warning of what is whole"
        for _ in range(flips):
            shutil.rmtree(case)
            shutil.copytree(whole, case)
            where, warnings.count = flip_one(draw, case, files), 0
            try:
                value = read(case)
            except UserError:
                counts["noticed"] += 1
                continue
            if warnings.count:
                counts["noticed"] += 1
            elif identity(value) == same:
                counts["harmless"] += 1
            else:
                counts["wrong"] += 1
                wrong.append(f"{name}: {where}")
    logging.getLogger("soft_truncation").removeHandler(warnings)
    return counts, wrong


def main():
    """Flip bits of the formats of the command line; exits with 0 if all were noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=KEPT, default=list(KEPT))
    parser.add_argument("--flips", type=int, default=500, help="for each format")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    environment.prepare()
    logging.getLogger("soft_truncation").propagate = False
    found, table = [], Table("kind", "flips", "noticed", "harmless", "read as something else")
    for name in options.formats:
        counts, wrong = flip(name, options.flips, options.seed)
        table.add(name, options.flips, *(counts[end] for end in ("noticed", "harmless", "wrong")))
        found += wrong
    table.show()
    print("\n".join(found))
    array = np.ones(2**28, np.float32)
    start = time.perf_counter()
    checksum(array)
    print(f"a checksum of 1 GiB takes {time.perf_counter() - start:.2f} s")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
