"""Four CPU devices for every test: set before JAX starts."""

import collections
import os
import tempfile
from importlib.metadata import version

import pytest

from runtime.environment import cache_dir, cpu_flags

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=4"
    " --xla_backend_optimization_level=0"  # most programs here run once: compile time counts
    f" {cpu_flags()}"
)
if version("jaxlib").startswith("0.10."):
    # These halve the time of compilation; jaxlib 0.12 does not know the first.
    os.environ["XLA_FLAGS"] += (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests, and the processes that they start, compile each program once; later runs find it again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "tests"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Downloads and decoded images of tests are not the user's.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache_")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


# They take longest: two processes share the files best if these come first.
_LONGEST = ("run_lib", "accelerators", "evaluation", "losses", "configs", "sampling", "models")


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}": i for i, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


class _FileProgress:
    """A line for each file of tests when its last test is done, instead of a dot for each test."""

    def __init__(self, terminal):
        self._terminal = terminal
        self._waiting, self._failed, self._seconds = (collections.Counter() for _ in range(3))
        self._counts = collections.Counter()

    def pytest_xdist_node_collection_finished(self, ids):
        self._counts = collections.Counter(name.split("::")[0] for name in ids)

    def pytest_collection_finish(self, session):
        self._counts = collections.Counter(item.nodeid.split("::")[0] for item in session.items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report):
        if report.passed or report.skipped:
            return ("passed" if report.when == "call" else ""), "", ""
        return None

    def pytest_runtest_logreport(self, report):
        file = report.nodeid.split("::")[0]
        self._seconds[file] += report.duration
        self._failed[file] += report.failed
        self._waiting[file] += report.when == "teardown"
        if report.when == "teardown" and self._waiting[file] == self._counts[file]:
            failed = f", {self._failed[file]} FAILED" if self._failed[file] else ""
            self._terminal.ensure_newline()
            self._terminal.write_line(
                f"{file:32} {self._counts[file]:4} tests {self._seconds[file]:6.0f} s{failed}"
            )


@pytest.hookimpl(trylast=True)  # the terminal's reporter is there
def pytest_configure(config):
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:  # not in xdist's workers
        config.pluginmanager.register(_FileProgress(terminal))


@pytest.fixture(scope="session", autouse=True)
def _no_curves():
    """No training.png: to draw it takes as long as a short training."""
    import evaluation
    from metrics import training_log

    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluation, training_log):
            patch.setattr(module, "plot_training", lambda *_: None)
        yield


@pytest.fixture
def curves(monkeypatch):
    """Trainings of one test draw it."""
    from metrics import training_log
    from runtime import pictures

    monkeypatch.setattr(training_log, "plot_training", pictures.plot_training)


@pytest.fixture(scope="module")
def small_network():
    """A network of four layers in place of the config's, for files about what is around it."""
    from tests.helpers import small_networks

    with small_networks():
        yield


@pytest.fixture
def small_network_here():
    """The same for one test."""
    from tests.helpers import small_networks

    with small_networks():
        yield


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory):
    return tmp_path_factory.mktemp("classifiers")


@pytest.fixture
def short_classifier(classifiers, monkeypatch):
    """The data's classifier is trained briefly, and once for all tests."""
    from metrics import scorers
    from metrics.classifier import get_classifier

    def get(train, test, _):
        return get_classifier(train, test, classifiers, steps=20, batch_size=32)

    monkeypatch.setattr(scorers, "get_classifier", get)
