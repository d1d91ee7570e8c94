"""Print the error messages for bad configs and bad files, and check their form.

python -m tests.stress.mistakes

Each row is a run of main.py. It must print one line after its log, without a traceback, end with
an exit status other than 0, and write no files.
"""

import argparse
import concurrent.futures
import pathlib
import re
import struct
import sys
import tempfile
import zipfile

import numpy as np
from PIL import Image

from benchmarks.measure import Table
from tests.helpers import GOLDEN
from tests.jobs import DIGITS, ROOT, run_main

# The tests have a case of each other mistake in a config (tests/test_run_lib.py).
CONFIGS = (
    "--config.training.batch_size=0",
    "--config.data.dataset=MNIST",
    "--config.data.image_size=9",
    "--config.data.dataset=folder",
    "--config.optim.optimizer=SGD",
    "--config.eval.begin_ckpt=3 --config.eval.end_ckpt=1",
    "--num_processes=2",
)


def write_files(folder):
    """Write bad files; returns {description: the flags that name the file}."""
    data = "--config.data.num_channels=3 --config.data.dataset=folder --config.data.path="
    fashion = "--config.data.dataset=fashion_mnist --config.data.path="
    scored = "--mode=eval --config.eval.samples="
    inception = "--mode=stats --config.eval.inception_path="
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    for i in range(10):
        Image.new("RGB", (8, 8)).save(folder / "broken" / f"{i}.png")
    whole = (folder / "broken" / "3.png").read_bytes()
    (folder / "broken" / "3.png").write_bytes(whole[:40])
    (folder / "idx").mkdir()
    (folder / "idx" / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, 9, 8, 8))
    checkpoint = (GOLDEN / "vp_ddpmpp.pth").read_bytes()
    (folder / "cut.pth").write_bytes(checkpoint[: len(checkpoint) // 2])
    with zipfile.ZipFile(folder / "hostile.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.")
    np.savez(folder / "small.npz", samples=np.zeros((9, 4, 4, 1), np.uint8))
    np.savez(folder / "floats.npz", samples=np.zeros((9, 8, 8, 1)))
    (folder / "text.npz").write_text("not an archive")
    (folder / "cut.tfrecords").write_bytes((1000).to_bytes(8, "little") + bytes(20))
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.json").write_text("{")
    return {
        "a folder that is not there": f"{data}{folder}/none",
        "a folder without images": f"{data}{folder}/empty",
        "a folder with a broken image": f"{data}{folder}/broken",
        "an IDX file that is cut short": f"{fashion}{folder}/idx",
        "a TFRecord file that is cut short": "--config.data.dataset=CelebAHQ "
        f"--config.data.num_channels=3 --config.data.path={folder}/cut.tfrecords",
        "a checkpoint that is cut short": f"--mode=import --checkpoint={folder}/cut.pth",
        "a checkpoint that would run a command": f"--mode=import --checkpoint={folder}/hostile.pth",
        "a checkpoint of another network": f"--mode=import --checkpoint={GOLDEN}/vp_ddpmpp.pth",
        "samples of another size": f"{scored}{folder}/small.npz",
        "samples that are not uint8": f"{scored}{folder}/floats.npz",
        "samples that are no archive": f"{scored}{folder}/text.npz",
        "Inception's weights that are another network's": f"{inception}{GOLDEN}/vp_ddpmpp.pth",
        "a workdir whose config is damaged": f"--workdir={folder}/damaged",
        "a workdir without checkpoints": "--mode=eval",
    }


def try_it(flags, workdir):
    """Run main.py; returns (its message, whether that is one line and no file was written)."""
    result = run_main(DIGITS, f"--workdir={workdir}", *flags.split())
    # Lines of the log begin with the time; the data are often read before the mistake is found.
    lines = [x for x in result.stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", x)]
    well = result.returncode != 0 and len(lines) == 1 and lines[0].startswith("error: ")
    return " / ".join(lines), well and not result.stdout and not workdir.exists()


def main():
    """Try all mistakes, and print the table; exits with 0 if all messages are good."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="those whose description contains this")
    only, table, bad = parser.parse_args().only, Table("given", "told"), 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        cases = {f"`{flags}`": flags for flags in CONFIGS} | write_files(folder)
        cases = {given: flags for given, flags in cases.items() if only in given}
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            workdirs = [folder / f"run{i}" for i in range(len(cases))]
            results = threads.map(try_it, cases.values(), workdirs)
            for given, (told, well) in zip(cases, results, strict=True):
                shown = told.removeprefix("error: ").replace(f"{ROOT}/", "")
                shown = shown.replace(str(folder), "DIR").replace("|", "/")
                table.add(given, shown + ("" if well else " **NOT WELL**"))
                bad += not well
    table.show()
    print(f"\n{len(cases)} mistakes, {bad} not told well")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
