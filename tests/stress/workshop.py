"""Every mode of the program on tiny data, to be disturbed by faults of storage and by kills.

`Workshop.run` runs a job in a forked process, so that nothing is imported a second time. The calls
that change files below its folder are counted, and one of them fails, or the process is killed
there (inject.c, which needs a C compiler). Inception's network is a stand-in, and the classifier
trains for a few steps only.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import enum
import functools
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import app
from PIL import Image

from tests.jobs import ROOT, TINY, last_line


class Fault(enum.IntEnum):
    """What happens at a call; the numbers are those of inject.c."""

    NONE = 0
    DISK_FULL = 1  # from that call on
    QUOTA = 2  # from that call on
    READ_ONLY = 3  # from that call on
    IO_ERROR = 4
    SHORT_WRITE = 5
    RENAME_FAILS = 6
    KILL = 7


class Job(NamedTuple):
    """A command of the program; {folder} in its arguments is the folder that it works in.

    `made` are the files that it makes, as patterns below the folder; they are compared. `given` are
    the files that it needs, which `Workshop` keeps.
    """

    arguments: tuple[str, ...]
    made: tuple[str, ...]
    given: tuple[str, ...] = ()
    program: str = "main"


FIELDS = """
data.image_size=8 data.num_channels=1 data.path={folder}/images
model.num_res_blocks=1 model.parametrization=noise
training.n_iters=4 training.eval_freq=4 training.snapshot_freq=4
training.snapshot_freq_for_preemption=2 training.snapshot_sampling=True
sampling.num_steps=2 sampling.batch_size=8 sampling.n_images=16
eval.num_samples=16 eval.sampling_batch_size=8 eval.num_test_data=8 eval.batch_size=4
eval.nll_steps=32 eval.nelbo_draws=1 eval.enable_fid=False eval.num_reference=32
"""
MAIN = (
    f"--config={ROOT}/configs/vp/folder_st.py",
    *TINY,
    *(f"--config.{field}" for field in FIELDS.split()),
)
RUN = (*MAIN, "--workdir={folder}/run")
SWEEP = """
from configs.vp import digits_st
from experiments.sweep import Sweep

def get_sweep():
    config = digits_st.get_config()
    config.model.update(nf=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=())
    config.training.update(batch_size=8, n_iters=4, log_freq=1, eval_freq=4, snapshot_freq=4)
    config.training.update(snapshot_freq_for_preemption=2, snapshot_sampling=False)
    config.eval.update(num_test_data=8, batch_size=4, nll_steps=32, nelbo_draws=1)
    config.eval.update(enable_fid=False, enable_sampling=False)
    return Sweep("tiny", config, {"a": {"training.k": 1.0}}, (0,))
"""
JOBS = {
    "train": Job((*RUN, "--mode=train"), ("run/checkpoints/4", "run/metrics.jsonl")),
    "eval": Job(
        (*RUN, "--mode=eval", "--config.eval.cache_dir={folder}/cache"),
        ("run/eval/report.json",),
        ("run",),
    ),
    "sample": Job((*RUN, "--mode=sample"), ("run/samples/samples.*",), ("run",)),
    "sample PNG": Job(
        (*RUN, "--mode=sample", "--config.sampling.format=png"),
        ("run/samples/png/*.png",),
        ("run",),
    ),
    "stats": Job(
        (*MAIN, "--mode=stats", "--config.eval.stats_path={folder}/stats/of_data.npz"),
        ("stats/of_data.npz",),
    ),
    "export": Job((*RUN, "--mode=export", "--to={folder}/model"), ("model/*",), ("run",)),
    "export .pth": Job(
        (*RUN, "--mode=export", "--to={folder}/model.pth", "--format=pth"), ("model.pth",), ("run",)
    ),
    "import": Job(
        (*MAIN, "--workdir={folder}/new", "--mode=import", "--checkpoint={folder}/given.pth"),
        ("new/checkpoints/4",),
        ("given.pth",),
    ),
    "experiments.run": Job(
        ("{folder}/sweep.py", "--out={folder}/out.jsonl", "--workdirs={folder}/runs"),
        ("out.jsonl",),
        ("sweep.py",),
        program="experiments.run",
    ),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended: its exit status (negative: a signal), what it said, and in which time."""

    status: int
    said: str
    seconds: float

    @property
    def is_well_told(self):
        """Whether it ended well, or told its error in one line."""
        errors = [line for line in self.said.splitlines() if line.startswith("error: ")]
        told = self.status == 0 or (errors == [last_line(self.said)] and self.status > 0)
        return told and "Traceback" not in self.said


class Workshop:
    """Runs jobs, one after the other, in a folder of their own."""

    def __init__(self, place):
        """Import the program, and make what jobs are given, below a folder."""
        self.folder, self._given, self._log = place / "job", place / "given", place / "log"
        self._limit = 600.0  # seconds after which a job hangs; less once programs are compiled
        self._given.mkdir()
        (self._given / "sweep.py").write_text(SWEEP)
        draw = np.random.default_rng(0)
        for label in ("a", "b"):
            (self._given / "images" / label).mkdir(parents=True)
            for i in range(40):
                levels = draw.integers(0, 256, (8, 8), np.uint8)
                Image.fromarray(levels).save(self._given / "images" / label / f"{i}.png")
        self._inject = ctypes.CDLL(os.environ["LD_PRELOAD"]).inject_arm
        # These are imported when they are needed; here once, and not in each job.
        import matplotlib.figure  # noqa: F401
        import sklearn.datasets
        import sklearn.metrics.pairwise  # noqa: F401

        import experiments.run
        import main
        import run_lib  # noqa: F401

        make_small()
        self._programs = {"main": main, "experiments.run": experiments.run}
        for name, made, given in (
            ("train", "run", "run"),
            ("export .pth", "model.pth", "given.pth"),
        ):
            self.undisturbed(name)
            (self.folder / made).rename(self._given / given)

    def clear(self, job):
        """Leave in the folder what the job is given, and nothing else."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        (self.folder / "images").symlink_to(self._given / "images")
        for given in job.given:
            source = self._given / given
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, self.folder / given)

    def run(self, job, fault=Fault.NONE, at=0, calls="", kill_after=None):
        """Run a job in the folder as it is.

        Args:
          job: the job.
          fault: what happens at call number `at`, from 1.
          at: the number.
          calls: a file that gets a line for each call.
          kill_after: seconds after which it is killed.
        """
        began = time.monotonic()
        child = os.fork()
        if not child:
            self._in_child(job, (int(fault), at, str(calls).encode()))
        until = began + (self._limit if kill_after is None else kill_after)
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
                ended = os.waitpid(child, 0)
                break
            time.sleep(0.002)
        seconds, said = time.monotonic() - began, self._log.read_text()
        if kill_after is None and seconds > self._limit:
            said += "\nhung\n"
        return Outcome(os.waitstatus_to_exitcode(ended[1]), said, seconds)

    def _in_child(self, job, fault):
        status = 1
        try:
            with self._log.open("w") as file:
                for stream in (1, 2):
                    os.dup2(file.fileno(), stream)
            os.environ["XDG_CACHE_HOME"] = str(self.folder / "cache")
            os.environ["MPLCONFIGDIR"] = str(self._given)  # or fonts are looked for each time
            self._inject(str(self.folder).encode(), *fault)
            status = self._call(job)
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def _call(self, job):
        program = self._programs[job.program]
        arguments = [text.format(folder=self.folder) for text in job.arguments]
        sys.argv = ["main.py", *arguments]
        try:
            if job.program == "main":
                app.run(program.main, flags_parser=program._parse)
            return int(program.main(arguments))
        except SystemExit as error:
            return int(error.code or 0)
        except BaseException:
            traceback.print_exc()
            return 1

    def undisturbed(self, name):
        """Run a job without faults; returns (digest, (call, path) of each call, seconds)."""
        job, calls = JOBS[name], self._log.with_name("calls")
        calls.unlink(missing_ok=True)
        self.clear(job)
        self._limit = 600.0
        outcome = self.run(job, calls=calls)
        self._limit = max(60.0, 3 * outcome.seconds)
        whole = self.digest(job)
        if outcome.status or whole == "nothing":
            raise SystemExit(f"an undisturbed {name} failed: {outcome.said[-2000:]}")
        lines = [line.split(" ", 2) for line in calls.read_text().splitlines()]
        return whole, [(what, path) for _, what, path in lines], outcome.seconds

    def digest(self, job):
        """A hash of what the job has made; "nothing" if a file is not there or can't be read."""
        file = self._log.with_name("digest")
        file.write_text("nothing")
        child = os.fork()
        if not child:
            with contextlib.suppress(Exception):
                file.write_text(digest(job, self.folder))
            os._exit(0)
        os.waitpid(child, 0)
        return file.read_text()


def make_small():
    """Replace Inception's network, and let the classifier train for 20 steps instead of 1,000."""
    import evaluation
    from metrics import classifier, scorers
    from metrics.features import Extractor

    scorers.get_classifier = functools.partial(classifier.get_classifier, steps=20, batch_size=8)
    projection = np.random.default_rng(0).standard_normal((64, 2048)).astype(np.float32)

    def fn(levels):
        rows = np.tanh(levels.reshape(len(levels), -1).astype(np.float32) / 16 @ projection)
        return {"features": rows, "logits": rows[:, :100]}

    extractor = Extractor("inception", "stand-in", fn, 7)
    evaluation.get_inception = lambda *_: extractor


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "second" not in k}
    return value


def content(path):
    """The bytes of a file or a checkpoint, without times and what else may differ."""
    if path.is_dir():
        state = ocp.StandardCheckpointer().restore(path / "default")
        return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))
    if path.suffix in (".json", ".jsonl"):
        text = path.read_text()
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        rows = sorted(json.dumps(without_times(json.loads(line))) for line in lines)
        return "\n".join(rows).encode()
    if path.suffix == ".npz":
        with np.load(path) as archive:
            arrays = dict(archive)
        facts = json.loads(str(arrays.pop("facts", "{}")))
        facts.pop("fingerprint", None)  # images that can't be kept are told by their files
        texts = [json.dumps(facts, sort_keys=True).encode(), *(x.encode() for x in arrays)]
        return b"".join([*texts, *(value.tobytes() for value in arrays.values())])
    return b"" if path.suffix == ".md" else path.read_bytes()


def digest(job, folder):
    whole = hashlib.sha256()
    for pattern in job.made:
        paths = sorted(folder.glob(pattern))
        if not paths:
            return "nothing"
        for path in paths:
            whole.update(path.name.encode() + content(path))
    return whole.hexdigest()


@contextlib.contextmanager
def workshop(module):
    """A workshop in a temporary folder; the process of `module` is started anew with inject.c."""
    # tempfile.TemporaryDirectory would be deleted by each child that ends.
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faults_"))
    try:
        if "inject" in os.environ.get("LD_PRELOAD", ""):
            yield Workshop(folder)
            return
        library, source = folder / "inject.so", pathlib.Path(__file__).with_name("inject.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
        env = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiling takes most of the time
            "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=env, cwd=ROOT, check=False).returncode)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
