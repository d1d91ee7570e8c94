"""The stage of the rehearsal: what a child process is given, what it did, and the tables' rows."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from tests.data_server import DataServer

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = {
    "CIFAR10": "configs/vp/cifar10_st.py",
    "SVHN": "configs/vp/cifar10_st.py",
    "STL10": "configs/rve/stl10_uncsnpp_st.py",
    "fashion_mnist": "configs/vp/fashion_mnist_st.py",
    "IMAGENET32": "configs/vp/imagenet32_ddpmpp_st.py",
    "IMAGENET32_2017": "configs/vp/imagenet32_ddpmpp_st.py",
    "CELEBA": "configs/vp/celeba_ddpmpp_nll_st.py",
    "CelebAHQ": "configs/ve/celebahq_uncsnpp_st.py",
    "FFHQ": "configs/rve/ffhq_256_uncsn.py",
    "LSUN": "configs/rve/bedroom_uncsn.py",
    "folder": "configs/vp/folder_st.py",
}
OF_ANOTHER = ("SVHN", "IMAGENET32_2017")  # whose recipe is another data set's
TINY = {
    "model": {"nf": 8, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()},
    "training": {
        "n_iters": 3,
        "batch_size": 8,
        "log_freq": 1,
        "eval_freq": 3,
        "snapshot_freq": 3,
        "snapshot_freq_for_preemption": 3,
        "snapshot_sampling": False,
    },
    "eval": {
        "batch_size": 8,
        "num_test_data": 4,
        "nll_steps": 32,
        "nelbo_draws": 1,
        "enable_fid": False,
        "num_samples": 8,
    },
    "sampling": {"method": "dpm_solver", "num_steps": 4, "batch_size": 8},
}
HEAD_READ = [
    "data set",
    "way",
    "command",
    "images",
    "brightness as read",
    "as written",
    "first start, s",
    "second start, s",
    "result",
]
HEAD_REFUSED = ["input", "exit code", "line"]
TOLERANCE = 2.5  # grey values, for lossy coding and resampling


def options(fields):
    """Fields by section as flags."""
    return [
        f"--config.{section}.{name}={value}"
        for section, values in fields.items()
        for name, value in values.items()
    ]


@dataclasses.dataclass(frozen=True)
class Job:
    """A data set, and how the user names its files: `data` has fields of config.data."""

    dataset: str
    data: dict

    @classmethod
    def of(cls, made):
        given = {name.removeprefix("data."): value for name, value in made.options.items()}
        given.pop("canary", None)
        return cls(made.dataset, {"path": str(made.path), **given})

    def arguments(self):
        """What the user types after `python main.py`."""
        name = {"dataset": self.dataset} if self.dataset in OF_ANOTHER else {}
        return ["--config", RECIPES[self.dataset], *options({"data": {**name, **self.data}})]


@dataclasses.dataclass(frozen=True)
class Started:
    """What a child process did."""

    code: int
    seconds: float
    text: str

    def told(self):
        """The line of its mistake, or its last one."""
        lines = self.text.strip().splitlines()
        return next((line for line in lines if line.startswith("error: ")), (lines or [""])[-1])

    def is_one_line(self):
        return self.code == 2 and self.text.count("error: ") == 1 and "Traceback" not in self.text


@dataclasses.dataclass(frozen=True)
class Stage:
    """The folder in which all happens, and the server that its children take for the internet."""

    folder: pathlib.Path
    server: DataServer

    def environment(self, server=None, shim=True, cache="", **more):
        """Of a child; `cache`: its XDG_CACHE_HOME. `server` False: no internet."""
        names = ("proxy", "http_proxy", "https_proxy", "no_proxy", "xla_flags")
        own = {key: value for key, value in os.environ.items() if key.lower() not in names}
        given = {} if server is False else (server or self.server).environment()
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return {
            **own,
            **given,
            "HOME": str(home),
            "XDG_CACHE_HOME": str(cache or home / ".cache"),
            "PYTHONPATH": str(self.folder / "shim") if shim else "",
            # Programs are compiled once for all, and fast.
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            **more,
        }

    def start(self, arguments, wrapper=(), **environment):
        """Run Python with these arguments, and wait."""
        began = time.monotonic()
        child = subprocess.run(
            [*wrapper, sys.executable, *arguments],
            env=self.environment(**environment),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=900,
        )
        return Started(child.returncode, time.monotonic() - began, child.stdout)

    def main(self, arguments, name, wrapper=(), **environment):
        """Run main.py with a tiny network, in a workdir of this name."""
        workdir = name if name.startswith("~") else self.folder / "work" / name
        given = ["main.py", *arguments, f"--workdir={workdir}", *options(TINY)]
        return self.start(given, wrapper, **environment)

    def load(self, jobs, wrapper=(), **environment):
        """What `load_and_measure` finds for each job, by name, in one child."""
        answers = pathlib.Path(tempfile.mkdtemp(dir=self.folder)) / "answers.json"
        asked = json.dumps({name: dataclasses.asdict(job) for name, job in jobs.items()})
        answers.with_name("jobs.json").write_text(asked)
        code = "import sys; from tests import rehearsal; rehearsal.load_and_measure(sys.argv[1])"
        child = self.start(["-c", code, str(answers.parent)], wrapper, **environment)
        if child.code:
            raise RuntimeError(f"the child that loads data failed:\n{child.text}")
        return json.loads(answers.read_text())


def load_and_measure(folder):
    """In a child: load each job of jobs.json twice, and write what was found to answers.json."""
    import numpy as np

    import datasets
    from configs.errors import UserError

    folder, answers = pathlib.Path(folder), {}
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        spec = importlib.util.spec_from_file_location("recipe", ROOT / RECIPES[job["dataset"]])
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        config = recipe.get_config()
        config.data.update(dataset=job["dataset"], **job["data"])
        answer = answers[name] = {"seconds": []}
        try:
            for _ in range(2):
                began = time.monotonic()
                try:
                    data = datasets.load_data(config)
                finally:
                    answer["seconds"].append(time.monotonic() - began)
            examples = [split.source.fetch(np.arange(len(split))) for split in data]
            answer["counts"] = [len(split) for split in data]
            answer["brightness"] = [float(found["image"].mean()) for found in examples]
            labelled = data.train.num_classes > 0
            answer["labels"] = [found["label"].tolist() for found in examples] if labelled else None
        except UserError as error:
            answer["error"] = " ".join(str(error).split())
        except Exception as error:  # which a user would see as a traceback
            answer["crash"] = f"{type(error).__name__}: {error}"
    (folder / "answers.json").write_text(json.dumps(answers))


@dataclasses.dataclass
class Row:
    """A row of the first table; `wrong` has what is not as it must be."""

    made: object
    job: Job
    way: str
    counts: list = dataclasses.field(default_factory=list)
    brightness: list = dataclasses.field(default_factory=list)
    seconds: list = dataclasses.field(default_factory=list)
    done: list = dataclasses.field(default_factory=list)
    wrong: list = dataclasses.field(default_factory=list)

    def compare(self, found, ordered=True):
        """Take over what `load_and_measure` found, and check it against what was written."""
        self.seconds = self.seconds or found["seconds"]
        if "counts" not in found:
            self.wrong.append(found.get("error") or found["crash"])
            return
        self.counts, self.brightness = found["counts"], found["brightness"]
        self.done.append("read")
        splits = ("train", "test")
        if self.counts != [self.made.counts[split] for split in splits]:
            self.wrong.append(f"{self.made.counts} images were written")
        near = zip(self.brightness, self.written(), strict=True)
        if max(abs(read - written) for read, written in near) > TOLERANCE:
            self.wrong.append("the brightness differs")
        labels = self.made.labels and [self.made.labels[split] for split in splits]
        if labels and found["labels"]:
            sort = list if ordered else sorted
            if [*map(sort, labels)] != [*map(sort, found["labels"])]:
                self.wrong.append("the labels differ")
        elif labels or found["labels"]:
            self.wrong.append("labels were lost" if labels else "there are labels")

    def written(self):
        """The brightness that must be read; Fashion-MNIST gets a black margin of two pixels."""
        share = (28 / 32) ** 2 if self.made.dataset == "fashion_mnist" else 1
        return [share * self.made.brightness[split] for split in ("train", "test")]

    def took(self, started, done):
        """Take over a run of main.py."""
        self.seconds.append(started.seconds)
        if started.code:
            self.wrong.append(f"{started.told()} (exit code {started.code})")
        else:
            self.done.append(done)

    def cells(self, folder):
        command = " ".join(["python main.py", *self.job.arguments()]).replace(str(folder), "DIR")
        result = "; ".join(self.wrong) or ", ".join(self.done)
        first, second = [f"{seconds:.1f}" for seconds in [*self.seconds, 0, 0][:2]]
        return (
            self.made.dataset,
            self.way,
            f"`{command}`",
            "/".join(map(str, self.counts)),
            "/".join(f"{read:.1f}" for read in self.brightness),
            "/".join(f"{written:.1f}" for written in self.written()),
            first,
            second,
            f"**wrong**: {result}" if self.wrong else result,
        )


@dataclasses.dataclass
class Refusal:
    """A row of the second table."""

    what: str
    code: str
    line: str
    good: bool

    @classmethod
    def of(cls, what, started, good=None, note=""):
        """Of a run of main.py, which has to end with one line if `good` does not say otherwise."""
        good = started.is_one_line() if good is None else good
        return cls(what, str(started.code), started.told() + note, good)

    def cells(self, folder):
        line = self.line.replace(str(folder), "DIR").replace("|", "\\|")
        return self.what, self.code, line if self.good else f"**wrong**: {line}"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
