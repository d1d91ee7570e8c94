"""Bring data as a user does, in every way that the project knows, and tell what came of it.

    python -m tests.rehearse_data [--only NAME ...] [--full] [--out OUT]

Tiny data sets are written in their authors' layouts (make_datasets), and a server on this machine
stands for the internet (data_server). The program is started in child processes with a home of
their own. One layout of each data set is trained on for three steps, and three are evaluated too;
the others are read by `datasets.load_data`. With --full each one is trained on and evaluated.

Two tables are printed: what was read, and what was refused. The exit code is 1 if a row is wrong.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import pathlib
import subprocess
import sys
import tempfile
import time

from tests.data_server import DataServer
from tests.rehearsal import HEAD_READ, HEAD_REFUSED, Job, Refusal, Row, Stage, table

GROUPS = ("downloads", "tfds", "mishaps")
EVALUATED = ("cifar10_python_tar", "lsun_lmdb", "edm_zip_unlabelled")
STARTED_BROKEN = ("cifar10_cut", "cifar10_code", "drive_page", "png_broken")

# A machine whose name server never answers: (resolv.conf, program, ...), in namespaces of its own.
SILENT_RESOLVER = """
import fcntl, os, socket, struct, subprocess, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
fcntl.ioctl(server, 0x8914, struct.pack("16sh22x", b"lo", 0x49))  # the loopback interface is up
server.bind(("127.0.0.1", 53))
server.set_inheritable(True)
subprocess.run(["mount", "--bind", sys.argv[1], "/etc/resolv.conf"], check=True)
os.execv(sys.argv[2], sys.argv[2:])
"""
# What users have run elsewhere: (name, folder, format; TFDS's default is tfrecord).
PREPARE = """
import sys
import tensorflow_datasets as tfds
tfds.builder(sys.argv[1], data_dir=sys.argv[2], file_format=sys.argv[3]).download_and_prepare()
"""


def layout_rows(stage, makes, full, pool):
    """A row for each layout: all are read, and one of each data set is trained on."""
    rows = {name: Row(made, Job.of(made), name) for name, made in makes.items()}
    first = {made.dataset: name for name, made in reversed(makes.items())}
    trained = [name for name in makes if full or name in first.values() or name in EVALUATED]

    def train(name):
        row = rows[name]
        for again in (False, True):
            done = "started again" if again else "trained for 3 steps"
            row.took(stage.main(row.job.arguments(), name), done)
        if full or name in EVALUATED:
            # Samples of a labelled set would be scored by a classifier, trained for minutes.
            sampling = f"--config.eval.enable_sampling={not row.made.labels}"
            arguments = ["--mode", "eval", *row.job.arguments(), sampling]
            row.took(stage.main(arguments, name), "evaluated")

    jobs = {name: row.job for name, row in rows.items()}
    loaded = pool.submit(stage.load, jobs, cache=stage.folder / "other_cache")
    list(pool.map(train, trained))
    for name, found in loaded.result().items():
        rows[name].compare(found)
    return list(rows.values())


def download_rows(stage, makes, pool):
    """A row for each data set that is downloaded from its authors."""
    from readers.published import PUBLISHED
    from tests.simulated_internet import DOWNLOADED

    debian = pathlib.Path(PUBLISHED["fashion_mnist"].installed)

    def row_of(dataset):
        made, name = makes[DOWNLOADED[dataset]], f"download_{dataset}"
        size = {"image_size": 48} if dataset == "STL10" else {}
        row = Row(made, Job(dataset, size), "downloaded from its authors")
        if dataset == "fashion_mnist" and debian.is_dir():
            row.done.append(f"not tried: {debian} is there, and is preferred")
            return row
        cache, requests = stage.folder / "caches" / name, []
        for done in ("trained for 3 steps", "started again"):
            row.took(stage.main(row.job.arguments(), name, cache=cache), done)
            requests.append([stage.server.counts[url] for url in PUBLISHED[dataset].downloads])
        if not all(requests[0]) or requests[0] != requests[1]:
            row.wrong.append(f"requests of the first start, and of both: {requests}")
        row.compare(stage.load({name: row.job}, cache=cache)[name])
        return row

    return list(pool.map(row_of, DOWNLOADED))


def tfds_rows(stage, makes):
    """Rows for what TFDS downloads and prepares, and for what it prepared elsewhere."""
    from tests.simulated_internet import PREPARED

    def row_of(layout, folder, way):
        job = Job.of(makes[layout])
        given = {**job.data, "tfds_dir": str(stage.folder / folder)}
        given.pop("path")
        return Row(makes[layout], Job(job.dataset, given), way)

    rows = {
        name: row_of(layout, "tfds", f"TFDS downloads and prepares {name}")
        for name, layout in PREPARED.items()
    }
    for kind in ("tfrecord", "array_record"):
        folder, way = f"tfds_{kind}", f"a folder of TFDS's cifar10, as {kind}"
        rows[kind] = row_of("cifar10_binary_tar", folder, way)
        prepared = stage.start(["-c", PREPARE, "cifar10", str(stage.folder / folder), kind])
        if prepared.code:
            rows[kind].wrong.append(prepared.told())
    loaded, requests = [], []
    for cache in ("tfds_cache", "other_tfds_cache"):  # what was decoded is not what is tried here
        jobs = {name: row.job for name, row in rows.items()}
        loaded.append(stage.load(jobs, cache=stage.folder / cache))
        requests.append(sum(stage.server.counts.values()))
    for name, row in rows.items():
        row.compare(loaded[0][name], ordered=False)
        if requests[0] != requests[1] or "counts" not in loaded[1][name]:
            row.wrong.append("what was prepared was not enough for a second start")
    for done in ("trained for 3 steps", "started again"):
        row = rows["tfrecord"]
        row.took(stage.main(row.job.arguments(), "tfds_tfrecord"), done)
    return list(rows.values())


def broken_rows(stage, makes, full, pool):
    """A row for each input that is to be refused."""
    loaded = pool.submit(stage.load, {name: Job.of(made) for name, made in makes.items()})

    def start(name):
        return Refusal.of(name, stage.main(Job.of(makes[name]).arguments(), name))

    started = [name for name in makes if full or name in STARTED_BROKEN]
    rows = dict(zip(started, pool.map(start, started), strict=True))
    for name, found in loaded.result().items():
        line = found.get("error") or found.get("crash") or f"it was read: {found['counts']}"
        rows.setdefault(name, Refusal(name, "UserError", line, True))
        canary = makes[name].options.get("canary")
        if "error" not in found:
            rows[name] = Refusal(name, "-", line, False)
        elif canary and pathlib.Path(canary).exists():
            rows[name] = Refusal(name, "-", "code in the file was run", False)
    return list(rows.values())


def mishap_rows(stage, makes, pool):
    """Rows for what goes wrong around the data: the network, the disk, two starts at once."""
    from readers.published import PUBLISHED

    whole, faces = makes["cifar10_python_tar"], makes["celeba_zip"]
    job = Job("CIFAR10", {})
    url = next(iter(PUBLISHED["CIFAR10"].downloads))
    python = sys.executable
    spaces = subprocess.run(["unshare", "-rnm", "true"], capture_output=True, check=False)
    resolver = stage.folder / "resolv.conf"
    resolver.write_text("nameserver 127.0.0.1\n")
    no_network = ("unshare", "-rn")
    silence = ("unshare", "-rnm", python, "-c", SILENT_RESOLVER, str(resolver))
    read_only = stage.folder / "read_only"
    read_only.mkdir()
    mounted = 'mount -t tmpfs -o ro tmpfs "$0" && exec "$@"'
    mount = ("unshare", "-rm", "sh", "-c", mounted, str(read_only))

    def by_tfds(dataset, **data):
        return Job(dataset, {**data, "tfds_dir": str(stage.folder / "tfds_missing")})

    def refused(what, server=None, wrapper=(), timed=False, job=job, **environment):
        if "unshare" in wrapper and spaces.returncode:
            return Refusal(what, "-", "not tried: no namespaces here", True)
        name = f"mishap_{what}".replace(" ", "_")
        environment = {"cache": stage.folder / "caches" / name, **environment}
        with contextlib.ExitStack() as stack:
            network = server and stack.enter_context(server)
            network = False if server is False else network
            started = stage.main(job.arguments(), name, wrapper, server=network, **environment)
            row = Refusal.of(what, started)
            if timed:
                found = stage.load({"it": job}, wrapper, server=network, **environment)["it"]
                row.line += f" (told after {found['seconds'][0]:.1f} s)"
                row.good = row.good and found["seconds"][0] < 10
        return row

    def kept_nowhere():
        started = stage.main(Job.of(faces).arguments(), "kept_nowhere", cache="/dev/null/x")
        lines = [line for line in started.text.splitlines() if "can't be kept" in line]
        row = Refusal.of("no cache folder for decoded images", started, started.code == 0)
        return dataclasses.replace(row, line=(lines or [row.line])[0], good=row.good and len(lines))

    def at_once():
        server = DataServer({url: whole.path.read_bytes()})
        cache, names = stage.folder / "caches" / "at_once", ("at_once_1", "at_once_2")
        with server, concurrent.futures.ThreadPoolExecutor(2) as two:

            def start(name):
                return stage.main(job.arguments(), name, server=server, cache=cache)

            both = list(two.map(start, names))
            # One request asks whether the address answers at all.
            good = [start.code for start in both] == [0, 0] and server.counts[url] == 2
            note = f" ({server.counts[url]} requests: is it there, and the download)"
        codes = " and ".join(str(start.code) for start in both)
        return Refusal("two starts at once", codes, both[0].told() + note, good)

    def at_home():
        home = stage.folder / "home"
        home.mkdir(exist_ok=True)
        (home / "archive.tar.gz").write_bytes(whole.path.read_bytes())
        of_home = Job("CIFAR10", {"path": "~/archive.tar.gz"})
        started = stage.main(of_home.arguments(), "~/run")
        good = started.code == 0 and (home / "run" / "config.json").exists()
        return Refusal.of("data.path and workdir below ~", started, good)

    tasks = [
        lambda: refused("a download with another checksum", shim=False),
        lambda: refused("the server answers 404", DataServer({url: 404})),
        lambda: refused("a download is cut off", DataServer(stage.server.files, cut=[url])),
        lambda: refused("the server hangs", DataServer({}, hang=[url]), timed=True),
        lambda: refused("no network", False, no_network, timed=True),
        lambda: refused("the name server is silent", False, silence, timed=True),
        lambda: refused("TFDS without a network", False, no_network, True, by_tfds("CIFAR10")),
        lambda: refused("no cache folder for downloads", cache="/dev/null/x"),
        lambda: refused("a read-only cache folder", None, mount, cache=read_only),
        kept_nowhere,
        at_once,
        at_home,
        lambda: refused("CelebAHQ by TFDS", job=by_tfds("CelebAHQ", image_size=32)),
        lambda: refused("LSUN by TFDS", job=by_tfds("LSUN", category="bedroom")),
    ]
    return list(pool.map(lambda task: task(), tasks))


def rehearse(only, full):
    """(text of both tables, whether all is right)."""
    from tests import make_datasets, simulated_internet

    began = time.monotonic()
    known = {*make_datasets.LAYOUTS, *make_datasets.BROKEN, *GROUPS}
    wanted = set(only or known)
    if wanted - known:
        raise SystemExit(f"--only: {', '.join(wanted - known)} is none of {', '.join(known)}")
    with (
        tempfile.TemporaryDirectory(prefix="rehearsal_") as folder,
        contextlib.ExitStack() as stack,
    ):
        folder = pathlib.Path(folder)

        def write(makers):
            written = {}
            for name, maker in makers.items():
                (folder / "data" / name).mkdir(parents=True)
                written[name] = maker(folder / "data" / name)
            return written

        layouts, broken = write(make_datasets.LAYOUTS), write(make_datasets.BROKEN)
        files, sums = simulated_internet.answers(layouts)
        simulated_internet.write_shim(folder / "shim", sums)
        stage = Stage(folder, stack.enter_context(DataServer(files)))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(2))
        read, refused = [], []
        chosen = {name: made for name, made in layouts.items() if name in wanted}
        if chosen:
            read += layout_rows(stage, chosen, full, pool)
        if "downloads" in wanted:
            read += download_rows(stage, layouts, pool)
        if "tfds" in wanted:
            read += tfds_rows(stage, layouts)
        chosen = {name: made for name, made in broken.items() if name in wanted}
        if chosen:
            refused += broken_rows(stage, chosen, full, pool)
        if "mishaps" in wanted:
            refused += mishap_rows(stage, layouts, pool)
        good = not any(row.wrong for row in read) and all(row.good for row in refused)
        minutes = (time.monotonic() - began) / 60
        text = "\n".join(
            [
                "Each command also has a tiny network and three steps; DIR is a temporary folder. "
                "Where a row says trained, the seconds are those of main.py, else of load_data.\n",
                table(HEAD_READ, [row.cells(folder) for row in read]),
                table(HEAD_REFUSED, [row.cells(folder) for row in refused]),
                f"{'All is right' if good else '**Some rows are wrong**'}; {minutes:.1f} minutes.",
            ]
        )
    return text, good


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="tests.rehearse_data", description=__doc__)
    names = f"of make_datasets' layouts, or {', '.join(GROUPS)}"
    parser.add_argument("--only", nargs="+", metavar="NAME", help=names)
    parser.add_argument("--full", action="store_true", help="train on and evaluate every layout")
    parser.add_argument("--out", type=pathlib.Path, help="write the tables to this file, too")
    given = parser.parse_args(arguments)
    text, good = rehearse(given.only, given.full)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
