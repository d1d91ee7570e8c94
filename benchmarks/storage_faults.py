"""Let every call that changes a file fail, in each mode; what it says, and what is lost.

    python -m benchmarks.storage_faults [--jobs train eval] [--kinds "disk full"] [--every 1]

For each fault: the job must end well or with one line; the same command afterwards must end as an
undisturbed run, bit for bit. Prints a table by job and kind of fault, and each case that was not
so. Needs a C compiler (inject.c).
"""

import argparse
import collections
import sys

from benchmarks.jobs import JOBS, Fault, workshop

_COLUMNS = ("faults", "went on", "one line", "same end")
# Every how many calls; a quota's fault is a full disk's but for its number.
_KINDS = {
    Fault.DISK_FULL: 1,
    Fault.QUOTA: 5,
    Fault.READ_ONLY: 5,
    Fault.IO_ERROR: 1,
    Fault.SHORT_WRITE: 1,
    Fault.RENAME_FAILS: 1,
}


def main() -> None:
    """Inject the faults that the command line asks for; exits with 0 if all were survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    kinds = {kind.name.lower().replace("_", " "): kind for kind in _KINDS}
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=list(kinds))
    parser.add_argument("--every", type=int, default=1, help="every n-th call only")
    options = parser.parse_args()
    wrong, table = [], []
    with workshop("benchmarks.storage_faults") as shop:
        for job in (JOBS[name] for name in options.jobs):
            whole, ops, seconds = shop.undisturbed(job)
            print(f"{job.name}: {len(ops)} calls, {seconds:.1f} s", flush=True)
            for name in options.kinds:
                kind, counts = kinds[name], collections.Counter[str]()
                for at in range(1, len(ops) + 1, options.every * _KINDS[kind]):
                    what, path = ops[at - 1]
                    if kind == Fault.RENAME_FAILS and what not in ("rename", "link"):
                        continue
                    if kind == Fault.SHORT_WRITE and what != "write":
                        continue
                    folder = shop.fresh(job, "run")
                    outcome = shop.run(job, folder, kind, at)
                    again = outcome if outcome.status == 0 else shop.run(job, folder)
                    same = again.status == 0 and shop.digest(job, folder) == whole
                    counts["faults"] += 1
                    counts["went on"] += outcome.status == 0
                    counts["one line"] += outcome.status != 0 and outcome.is_well_told
                    counts["same end"] += same
                    if counts["faults"] % 25 == 0:
                        print(f"{name}: call {at} of {len(ops)}", flush=True)
                    if not (same and outcome.is_well_told):
                        wrong.append(f"{job.name}, {name} at call {at}, {what} {path}")
                        shown = outcome.said[-1500:] if not outcome.is_well_told else ""
                        shown += "" if same else f"\nagain: {again.status} {again.said[-1500:]}"
                        print(f"WRONG: {wrong[-1]}: status {outcome.status}\n{shown}", flush=True)
                if counts:
                    numbers = " | ".join(str(counts[column]) for column in _COLUMNS)
                    table.append((f"| {job.name} | {name} | {numbers} |", counts["faults"]))
                    print(table[-1][0], flush=True)
    print(f"\n| mode | fault | {' | '.join(_COLUMNS)} |\n|---|---|{'---|' * len(_COLUMNS)}")
    print("\n".join(text for text, _ in table))
    total = sum(count for _, count in table)
    print(f"\n{total} faults; {len(wrong)} not survived as they should be")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
