"""Kill runs many times; each must end, by the same command, as an undisturbed one, bit for bit.

    python -m benchmarks.kill_training --kills 200 --modes all

For each mode of the program (benchmarks/jobs.py) a run on tiny data is killed by SIGKILL again and
again and started again by the same command: in turn at a random call that changes a file, at a
random renaming of a file, and at a random time. After a few kills the run may end, what it has
made is compared with that of an undisturbed run, and a new one begins. Prints a line for each
kill, and a table. Needs a C compiler (inject.c).
"""

import argparse
import collections
import random
import sys

from benchmarks.jobs import JOBS, Fault, workshop

_KILLS_A_RUN = 4
_MOMENTS = ("at a call", "at a rename", "at a time")
_COLUMNS = ("kills", *_MOMENTS, "runs", "identical")


def _line(name: str, count: collections.Counter[str]) -> str:
    return f"| {name} | {' | '.join(str(count[column]) for column in _COLUMNS)} |"


def main() -> None:
    """Kill the modes' runs; the exit status is 0 if all ended as the undisturbed ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--modes", default="train", help="names, divided by commas, or all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = list(JOBS) if options.modes == "all" else options.modes.split(",")
    if unknown := [name for name in names if name not in JOBS]:
        sys.exit(f"--modes: {unknown[0]!r} is none of {', '.join(JOBS)}, all")
    draw, table = random.Random(options.seed), {}
    with workshop("benchmarks.kill_training") as shop:
        for number, name in enumerate(names):
            job, count = JOBS[name], collections.Counter[str]()
            table[name] = count
            whole, ops, seconds = shop.undisturbed(job)
            renames = [i for i, (what, _) in enumerate(ops, 1) if what == "rename"]
            wanted = (options.kills + number) // len(names)
            tries = 0
            while count["kills"] < wanted:
                folder, killed = shop.fresh(job, "run"), 0
                while killed < _KILLS_A_RUN and count["kills"] < wanted and tries < 10 * wanted:
                    moment = _MOMENTS[tries % 3]
                    tries += 1
                    if moment == "at a time":
                        after = draw.uniform(0, seconds)
                        outcome = shop.run(job, folder, kill_after=after)
                    else:
                        at = draw.choice(renames if moment == "at a rename" else range(1, len(ops)))
                        outcome = shop.run(job, folder, Fault.KILL, at)
                    if outcome.status != -9:  # it had less to do than that
                        break
                    killed += 1
                    count["kills"] += 1
                    count[moment] += 1
                    where = f"{after:.1f} s" if moment == "at a time" else f"number {at}"
                    print(f"{name}: kill {count['kills']}/{wanted} {moment}, {where}", flush=True)
                # What was done before the kill came is refused a second time, by import and export.
                last = shop.run(job, folder)
                same = last.is_well_told and shop.digest(job, folder) == whole
                count["runs"] += 1
                count["identical"] += same
                if not same:
                    print(f"NOT IDENTICAL: {name}: {last.status} {last.said[-2000:]}", flush=True)
            print(_line(name, count), flush=True)
    print(f"\n| mode | {' | '.join(_COLUMNS)} |\n|---|{'---|' * len(_COLUMNS)}")
    for name, count in table.items():
        print(_line(name, count))
    total = sum(table.values(), collections.Counter())
    print(_line("all", total))
    sys.exit(total["runs"] != total["identical"])


if __name__ == "__main__":
    main()
