"""Damage files of each format that people bring; each must be read, or refused in one line.

    python -m tests.stress.fuzz [--formats pth npz] [--seconds 3600] [--seed 0]

Bytes are changed, cut, doubled and set to extreme numbers, in members of archives too. A child
process reads one damaged file after the other, with 1 GiB of memory. Wrong are: an exception that
is no UserError, a message of several lines, a crash, a read of more than 20 seconds, and a file
that appears outside. Prints a table, and each file that was wrong.
"""

import argparse
import collections
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

from benchmarks.measure import Table
from configs.errors import UserError
from tests.stress.formats import BROUGHT

MEMORY = 2**30
SECONDS_A_FILE = 20
NUMBERS = (0, 1, 0x7F, 0xFF, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 10**12, 2**63 - 1)
ENDS = ("read", "refused", "wrong", "crash")


def damage(draw, data):
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
            number = draw.choice(NUMBERS)
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


def damage_archive(draw, data):
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


def spoil(draw, folder):
    """Damage one file of a folder; returns its name."""
    path = draw.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    data = path.read_bytes()
    is_zip = data[:2] == b"PK" and draw.random() < 0.6
    path.write_bytes(damage_archive(draw, data) if is_zip else damage(draw, data))
    return path.name


def try_one(read, folder):
    """(read, refused or wrong; what was wrong)."""
    try:
        read(folder)
    except UserError as error:
        lines = len(str(error).splitlines())
        return ("refused", "") if lines == 1 else ("wrong", f"{lines} lines: {error}")
    except BaseException:
        return "wrong", traceback.format_exc()
    return "read", ""


def too_long(*_):
    raise TimeoutError(f"longer than {SECONDS_A_FILE} seconds")


def read_damaged(read, place, seed, end):
    """Read one damaged copy of place/whole after the other, and note the ends in a file."""
    taken = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    signal.signal(signal.SIGALRM, too_long)
    with (place / "results.jsonl").open("a") as file:
        while time.time() < end:
            shutil.rmtree(place / "case", ignore_errors=True)
            shutil.copytree(place / "whole", place / "case")
            (place / "seed").write_text(str(seed))
            name = spoil(random.Random(seed), place / "case")
            signal.alarm(SECONDS_A_FILE)
            kind, what = try_one(read, place / "case")
            signal.alarm(0)
            row = {"kind": kind, "what": what and f"seed {seed}, {name}: {what}"}
            file.write(json.dumps(row) + "\n")
            file.flush()
            seed += 1


def in_a_child(function, *args):
    """Call a function in a forked process without messages; returns its status."""
    child = os.fork()
    if not child:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            function(*args)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fuzz(name, seconds, seed):
    """Read damaged files for so long; returns (the counts of each end, what was wrong)."""
    (write, read), counts, wrong = BROUGHT[name], collections.Counter(), []
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        place = pathlib.Path(folder)
        (place / "whole").mkdir()
        write(place / "whole")
        read(shutil.copytree(place / "whole", place / "case"))  # what is not damaged is read
        (place / "results.jsonl").touch()
        inside = {path.name for path in place.iterdir()} | {"seed", "cache"}
        end = time.time() + seconds
        while time.time() < end:
            if status := in_a_child(read_damaged, read, place, seed, end):
                seed = int((place / "seed").read_text())
                counts["crash"] += 1
                wrong.append(f"seed {seed}: the reader died with {status}")
                seed += 1
        rows = [json.loads(row) for row in (place / "results.jsonl").read_text().splitlines()]
        counts.update(row["kind"] for row in rows)
        wrong += [row["what"] for row in rows if row["what"]]
        outside = {path.name for path in place.iterdir()} - inside
    return counts, [*wrong, *(f"{path} was written outside" for path in outside)]


def main():
    """Fuzz the formats of the command line; exits with 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=BROUGHT, default=list(BROUGHT))
    parser.add_argument("--seconds", type=float, default=60, help="for each format")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed, table = False, Table("format", "files", "read", "refused", "wrong", "crashes")
    with tempfile.TemporaryDirectory(prefix="fuzz_cache_") as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        for name in options.formats:
            counts, wrong = fuzz(name, options.seconds, options.seed)
            table.add(name, counts.total(), *(counts[end] for end in ENDS))
            for text in {text.strip().splitlines()[-1]: text for text in wrong}.values():
                print(f"WRONG, {name}, {text}", flush=True)
            failed |= bool(wrong)
    table.show()
    sys.exit(failed)


if __name__ == "__main__":
    main()
