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
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
_SECONDS = 60  # after which a job hangs; longer while programs are compiled


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


@dataclasses.dataclass(frozen=True)
class Job:
    """A command of the program.

    Attributes:
      name: of the mode.
      arguments: folder → the arguments of main.py, or of experiments.run.
      made: the files that it makes, as patterns below the folder; they are compared.
      given: the folders that it needs, which `Workshop` keeps.
      program: "main" or "experiments.run".
    """

    name: str
    arguments: Callable[[pathlib.Path], list[str]]
    made: tuple[str, ...]
    given: tuple[str, ...] = ()
    program: str = "main"


def _main(*flags: str) -> Callable[[pathlib.Path], list[str]]:
    config = [f"--config={ROOT}/configs/vp/folder_st.py", "--config.data.image_size=8"]
    config += ["--config.data.num_channels=1", "--config.model.nf=8", "--config.model.ch_mult=(1,)"]
    config += ["--config.model.num_res_blocks=1", "--config.model.attn_resolutions=()"]
    config += ["--config.model.parametrization=noise"]
    config += ["--config.training.batch_size=8", "--config.training.n_iters=4"]
    config += ["--config.training.log_freq=1", "--config.training.eval_freq=4"]
    config += ["--config.training.snapshot_freq=4"]
    config += ["--config.training.snapshot_freq_for_preemption=2", "--config.sampling.num_steps=2"]
    config += ["--config.sampling.batch_size=8", "--config.sampling.n_images=16"]
    config += ["--config.eval.num_samples=16", "--config.eval.sampling_batch_size=8"]
    config += ["--config.eval.num_test_data=8", "--config.eval.batch_size=4"]
    config += ["--config.eval.nll_steps=32", "--config.eval.nelbo_draws=1"]
    config += ["--config.eval.enable_fid=False", "--config.eval.num_reference=32"]
    return lambda folder: [
        *config,
        f"--config.data.path={folder}/images",
        *(flag.format(folder=folder) for flag in flags),
    ]


def _sweep(folder: pathlib.Path) -> list[str]:
    file = folder.parent / "given" / "sweep.py"
    return [str(file), f"--out={folder}/out.jsonl", f"--workdirs={folder}/runs"]


_RUN = "--workdir={folder}/run"
JOBS = {
    job.name: job
    for job in (
        Job("train", _main(_RUN, "--mode=train"), ("run/checkpoints/4", "run/metrics.jsonl")),
        Job(
            "eval",
            _main(_RUN, "--mode=eval", "--config.eval.cache_dir={folder}/cache"),
            ("run/eval/report.json",),
            ("run",),
        ),
        Job("sample", _main(_RUN, "--mode=sample"), ("run/samples/samples.*",), ("run",)),
        Job(
            "sample PNG",
            _main(_RUN, "--mode=sample", "--config.sampling.format=png"),
            ("run/samples/png/*.png",),
            ("run",),
        ),
        Job(
            "stats",
            _main("--mode=stats", "--config.eval.stats_path={folder}/stats/of_data.npz"),
            ("stats/of_data.npz",),
        ),
        Job("export", _main(_RUN, "--mode=export", "--to={folder}/model"), ("model/*",), ("run",)),
        Job(
            "export .pth",
            _main(_RUN, "--mode=export", "--to={folder}/model.pth", "--format=pth"),
            ("model.pth",),
            ("run",),
        ),
        Job(
            "import",
            _main("--workdir={folder}/new", "--mode=import", "--checkpoint={folder}/given.pth"),
            ("new/checkpoints/4",),
            ("given.pth",),
        ),
        Job("experiments.run", _sweep, ("out.jsonl",), program="experiments.run"),
    )
}
_SWEEP = """
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


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended: its exit status (negative: a signal), what it said, and in which time."""

    status: int
    said: str
    seconds: float

    @property
    def last(self) -> str:
        """The last line that it said."""
        return (self.said.strip().splitlines() or [""])[-1]

    @property
    def is_well_told(self) -> bool:
        """Whether it ended well, or told its error in one line."""
        errors = [line for line in self.said.splitlines() if line.startswith("error: ")]
        told = self.status == 0 or (self.last.startswith("error: ") and len(errors) == 1)
        return told and "Traceback" not in self.said and self.status >= 0


class Workshop:
    """Runs jobs in folders of their own, below one temporary folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Import the program, and make what jobs are given."""
        self._folder, self._given = folder, folder / "given"
        self._given.mkdir()
        (self._given / "sweep.py").write_text(_SWEEP)
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

        _make_small()
        self._programs = {"main": main, "experiments.run": experiments.run}
        for job, made, given in (
            ("train", "run", "run"),
            ("export .pth", "model.pth", "given.pth"),
        ):
            place = self.fresh(JOBS[job], "making")
            outcome = self.run(JOBS[job], place, limit=600)
            if outcome.status:
                raise SystemExit(f"an undisturbed {job} failed: {outcome.said[-2000:]}")
            (place / made).rename(self._given / given)

    def fresh(self, job: Job, name: str) -> pathlib.Path:
        """A new folder with what the job is given."""
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "images").symlink_to(self._given / "images")
        for given in job.given:
            source = self._given / given
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / given)
        return folder

    def run(
        self,
        job: Job,
        folder: pathlib.Path,
        fault: Fault = Fault.NONE,
        at: int = 0,
        calls: str = "",
        kill_after: float | None = None,
        limit: float = _SECONDS,
    ) -> Outcome:
        """Run a job in its folder.

        Args:
          job, folder: the job, and its folder from `fresh`.
          fault: what happens at call number `at`, from 1.
          at: the number.
          calls: a file that gets a line for each call.
          kill_after: seconds after which it is killed.
          limit: seconds after which it counts as hanging.
        """
        says, began = folder.with_suffix(".log"), time.monotonic()
        child = os.fork()
        if not child:
            self._in_child(job, folder, says, (fault, at, calls))
        until = began + (limit if kill_after is None else kill_after)
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                if kill_after is None:
                    with says.open("a") as file:
                        file.write("\nhung\n")
                break
            time.sleep(0.002)
        seconds = time.monotonic() - began
        return Outcome(os.waitstatus_to_exitcode(status), says.read_text(), seconds)

    def _in_child(self, job: Job, folder: pathlib.Path, says: pathlib.Path, fault: Any) -> None:
        status = 1
        try:
            with says.open("w") as file:
                for stream in (1, 2):
                    os.dup2(file.fileno(), stream)
            os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
            os.environ["MPLCONFIGDIR"] = str(self._given)  # or fonts are looked for each time
            arguments = job.arguments(folder)
            kind, at, calls = fault
            self._inject(str(folder).encode(), int(kind), at, calls.encode())
            status = self._call(job.program, arguments)
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def _call(self, program: str, arguments: list[str]) -> int:
        from absl import app

        sys.argv = ["main.py", *arguments]
        try:
            if program == "main":
                app.run(self._programs[program].main, flags_parser=self._programs[program]._parse)
            return int(self._programs[program].main(arguments))
        except SystemExit as error:
            return int(error.code or 0)
        except BaseException:
            traceback.print_exc()
            return 1

    def undisturbed(self, job: Job) -> tuple[str, list[tuple[str, str]], float]:
        """Run a job without faults; returns (digest, (call, path) of each call, seconds)."""
        folder = self.fresh(job, "run")
        calls = folder.with_suffix(".calls")
        calls.unlink(missing_ok=True)
        outcome = self.run(job, folder, calls=str(calls), limit=600)
        whole = self.digest(job, folder)
        if outcome.status or whole == "nothing":
            raise SystemExit(f"an undisturbed {job.name} failed: {outcome.said[-2000:]}")
        lines = [line.split(" ", 2) for line in calls.read_text().splitlines()]
        return whole, [(what, path) for _, what, path in lines], outcome.seconds

    def digest(self, job: Job, folder: pathlib.Path) -> str:
        """A hash of what the job has made; "nothing" if a file is not there or can't be read."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            said = "nothing"
            with contextlib.suppress(Exception):
                said = _digest(job, folder)
            os.write(writing, said.encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as file:
            said = file.read()
        os.waitpid(child, 0)
        return said


def _make_small() -> None:
    """Replace Inception's network, and let the classifier train for 20 steps instead of 1,000."""
    import evaluation
    from metrics import classifier, scorers
    from metrics.features import Extractor

    briefly = functools.partial(classifier.get_classifier, steps=20, batch_size=8)
    scorers.get_classifier = briefly  # type: ignore[assignment]

    projection = np.random.default_rng(0).standard_normal((64, 2048)).astype(np.float32)

    def fn(levels: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.tanh(levels.reshape(len(levels), -1).astype(np.float32) / 16 @ projection)
        return {"features": rows, "logits": rows[:, :100]}

    extractor = Extractor("inception", "stand-in", fn, 7)
    evaluation.get_inception = lambda *_: extractor  # type: ignore[assignment]


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if "second" not in k}
    return value


def _digest(job: Job, folder: pathlib.Path) -> str:
    whole = hashlib.sha256()
    for pattern in job.made:
        paths = sorted(folder.glob(pattern))
        if not paths:
            return "nothing"
        for path in paths:
            whole.update(path.name.encode())
            if path.is_dir():  # a checkpoint
                import jax
                import orbax.checkpoint as ocp

                for leaf in jax.tree.leaves(ocp.StandardCheckpointer().restore(path / "default")):
                    whole.update(np.asarray(leaf).tobytes())
            elif path.suffix in (".json", ".jsonl"):
                text = path.read_text()
                lines = text.splitlines() if path.suffix == ".jsonl" else [text]
                rows = sorted(json.dumps(_without_times(json.loads(x))) for x in lines)
                whole.update("\n".join(rows).encode())
            elif path.suffix == ".npz":
                with np.load(path) as arrays:
                    for name in arrays.files:
                        value = np.asarray(arrays[name]).tobytes()
                        if name == "facts":  # images that can't be kept are told by their files
                            facts = json.loads(str(arrays[name]))
                            facts.pop("fingerprint", None)
                            value = json.dumps(facts, sort_keys=True).encode()
                        whole.update(name.encode() + value)
            elif path.suffix != ".md":
                whole.update(path.read_bytes())
    return whole.hexdigest()


@contextlib.contextmanager
def workshop(module: str) -> Iterator[Workshop]:
    """A workshop in a temporary folder; the process of `module` is started anew with inject.c."""
    if "inject" not in os.environ.get("LD_PRELOAD", ""):
        folder = pathlib.Path(tempfile.mkdtemp(prefix="faults_"))
        library = folder / "inject.so"
        compile_it = [
            "cc",
            "-shared",
            "-fPIC",
            "-O1",
            "-o",
            str(library),
            str(ROOT / "benchmarks/inject.c"),
        ]
        try:
            subprocess.run(compile_it, check=True)
            env = dict(os.environ, LD_PRELOAD=str(library))
            env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            env |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "JAX_PLATFORMS": "cpu"}
            env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            command = [sys.executable, "-m", module, *sys.argv[1:]]
            sys.exit(subprocess.run(command, env=env, cwd=ROOT, check=False).returncode)
        finally:
            shutil.rmtree(folder)
    place = pathlib.Path(tempfile.mkdtemp(prefix="faults_"))  # a child that ends must not delete it
    try:
        yield Workshop(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
