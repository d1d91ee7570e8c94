"""Let calls that change a file fail, or kill the program there, in each mode of it.

    python -m tests.stress.faults [--jobs train eval] [--kinds "disk full"] [--every 1]
    python -m tests.stress.faults --kinds kill "kill at a rename" "kill at a time" --draws 20

For each fault (tests/stress/workshop.py) a job must end well or with one line, but for a kill; the
same command afterwards must make what an undisturbed run makes, bit for bit. A kind of fault comes
at every call in turn, or with `--draws` at so many random ones. Of kills up to four come in a row.
Prints a table by job and kind of fault, and each case that was not so. Needs a C compiler
(inject.c).
"""

import argparse
import collections
import random
import signal
import sys

from benchmarks.measure import Table
from tests.stress.workshop import JOBS, Fault, workshop

KILLS_IN_A_ROW = 4
COLUMNS = ("faults", "went on", "one line", "killed", "same end")  # once for kills in a row
# name: (the fault, every how many of these calls, the calls that can suffer it if not all)
KINDS = {
    "disk full": (Fault.DISK_FULL, 1, ()),
    "quota": (Fault.QUOTA, 5, ()),  # a full disk's but for its number
    "read only": (Fault.READ_ONLY, 5, ()),
    "io error": (Fault.IO_ERROR, 1, ()),
    "short write": (Fault.SHORT_WRITE, 1, ("write",)),
    "rename fails": (Fault.RENAME_FAILS, 1, ("rename", "link")),
    "kill": (Fault.KILL, 1, ()),
    "kill at a rename": (Fault.KILL, 1, ("rename",)),
    "kill at a time": (Fault.NONE, 1, ()),
}


def disturb(shop, job, kind, at, whole, draw):
    """Run a job with a fault at a call, or killed after seconds; the counts, and what was wrong."""
    fault, kills = KINDS[kind][0], kind.startswith("kill")
    count = collections.Counter()
    shop.clear(job)
    for _ in range(draw.randint(1, KILLS_IN_A_ROW) if kills else 1):
        outcome = shop.run(job, kill_after=at) if fault == Fault.NONE else shop.run(job, fault, at)
        killed = kills and outcome.status == -signal.SIGKILL
        count.update({"faults": 1, "killed": killed, "went on": outcome.status == 0})
        count["one line"] += outcome.status > 0 and outcome.is_well_told
        if not killed:
            break
    again = outcome if outcome.status == 0 else shop.run(job)
    # What was done before a kill came is refused a second time, by import and export.
    well = again.is_well_told if kills else again.status == 0
    count["same end"] += well and shop.digest(job) == whole
    if count["same end"] and (killed or outcome.is_well_told):
        return count, ""
    said = f"{outcome.status}: {outcome.said[-1500:]}\nagain: {again.status}: {again.said[-1500:]}"
    return count, f"{kind} at {at}: {said}"


def places(kind, calls, seconds, options, draw):
    """Where a fault comes: the numbers of calls, or seconds."""
    fault, each, suffer = KINDS[kind]
    numbers = [i for i, (what, _) in enumerate(calls, 1) if not suffer or what in suffer]
    if fault == Fault.NONE:
        return [draw.uniform(0, seconds) for _ in range(options.draws or len(numbers))]
    if options.draws and numbers:
        return draw.choices(numbers, k=options.draws)
    return numbers[:: options.every * each]


def main():
    """Disturb jobs as the command line asks for; exits with 0 if all was survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--every", type=int, default=1, help="every n-th call only")
    parser.add_argument("--draws", type=int, help="random calls, in place of all in turn")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed, draw, table = False, random.Random(options.seed), Table("mode", "fault", *COLUMNS)
    with workshop("tests.stress.faults") as shop:
        for name in options.jobs:
            whole, calls, seconds = shop.undisturbed(name)
            print(f"{name}: {len(calls)} calls, {seconds:.1f} s", flush=True)
            for kind in options.kinds:
                total = collections.Counter()
                for at in places(kind, calls, seconds, options, draw):
                    count, wrong = disturb(shop, JOBS[name], kind, at, whole, draw)
                    total += count
                    if wrong:
                        failed = True
                        print(f"WRONG: {name}, {wrong}", flush=True)
                table.add(name, kind, *(total[column] for column in COLUMNS))
    table.show()
    sys.exit(failed)


if __name__ == "__main__":
    main()
