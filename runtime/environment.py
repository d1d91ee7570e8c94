"""Settings that main.py and the experiments make before JAX starts."""

import contextlib
import ctypes
import functools
import glob
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import re
import sys
import warnings
from typing import Any

from absl import logging as absl_logging

from configs.errors import UserError

log = logging.getLogger("soft_truncation")

_CACHE_ERROR = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '([^']+)': (.*)", re.DOTALL
)


_LONGEST = 4000  # characters of a line

# An entry for each program that was compiled and kept since `load_compiled` was called.
_just_compiled: list[str] = []


def cache_dir() -> pathlib.Path:
    """The user's cache folder for this project; UserError if the user has none."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError as error:  # as in a container, for a user that it does not know
        raise UserError(
            "there is no home directory to keep files in; set XDG_CACHE_HOME to a folder"
        ) from error
    return pathlib.Path(base) / "soft_truncation"


def shown(text: str) -> str:
    """A text with its control characters as numbers, so that it is harmless in a terminal.

    Text from files of others (names, configs, errors about them) may have such characters.
    """
    text = text if len(text) < _LONGEST else text[:_LONGEST] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _OneLine(logging.Formatter):
    """Formats a record as one line of the log, and a traceback as lines below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = shown(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(shown, super().formatException(ei).split("\n")))


def _keep_programs() -> None:
    """Let JAX cache compiled programs in the user's cache folder, if that is writable."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    try:
        folder = cache_dir() / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, UserError):
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def mend_cache(message: str) -> bool:
    """Delete the damaged programs that a warning of JAX's compile cache names, and say so.

    JAX never replaces an entry, so an incomplete one would cause a warning at every start.

    Returns:
      Whether the message is such a warning.
    """
    import jax

    found = _CACHE_ERROR.match(message)
    if not found:
        return False
    kind, name, reason = found.groups()
    folder = pathlib.Path(getattr(jax.config, "jax_compilation_cache_dir", None) or "")
    if kind == "writing":
        log.info("compiled programs are not kept in %s (%s)", folder, reason.split("\n")[0])
        return True
    try:
        for path in folder.glob(f"{glob.escape(name)}-*"):
            path.unlink()
        log.info("a damaged program in %s is compiled anew", folder)
    except OSError:
        _tell_unreadable(folder)
    return True


@functools.cache
def _tell_unreadable(folder: pathlib.Path) -> None:
    """Log once that programs of a cache can be neither read nor replaced."""
    log.info(
        "compiled programs in %s can be neither read nor replaced, are they of another user? "
        "JAX_COMPILATION_CACHE_DIR names another folder",
        folder,
    )


def _watch_cache() -> None:
    """Pass warnings of JAX's compile cache to `mend_cache` instead of the terminal."""
    show = warnings.showwarning

    def shown(message: Any, *place: Any, **options: Any) -> None:
        if not mend_cache(str(message)):
            show(message, *place, **options)

    warnings.showwarning = shown


def _note_compiled(event: str, **_: Any) -> None:
    """Listen to JAX's events."""
    if event == "/jax/compilation_cache/cache_misses":  # one is written to the cache
        _just_compiled.append(event)


@functools.cache
def _listen() -> None:
    import jax

    jax.monitoring.register_event_listener(_note_compiled)


def load_compiled() -> None:
    """On a CPU, let programs that were just compiled be loaded from the compile cache.

    A training step is a quarter to a half slower in the process that compiled it than in one that
    loaded it (jaxlib 0.10.2 and 0.12.0.1, docs/speed.md). Functions are traced again.
    """
    import jax

    if _just_compiled and jax.default_backend() == "cpu":
        jax.clear_caches()
    _just_compiled.clear()


def cpu_flags() -> str:
    """XLA flags that make training on a CPU faster; empty if this jaxlib may not know them.

    They turn YNNPACK off for convolutions. It makes their gradients up to twice as slow in jaxlib
    0.10, and a little slower in 0.12. XLA aborts a program that sets a flag unknown to it.
    """
    known = importlib.metadata.version("jaxlib").startswith(("0.10.", "0.12."))
    return "--xla_cpu_experimental_ynn_fusion_type=" if known else ""


def _runs_on_cpu() -> bool:
    """Whether JAX will find no accelerator, found out without starting JAX."""
    platforms = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME")
    if platforms:
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


def check_devices() -> None:
    """Start JAX; UserError if it finds no device of the kind that JAX_PLATFORMS asks for."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = f": {error}" if str(error) else ""
        raise UserError(
            f"JAX finds no device{reason}; JAX_PLATFORMS is {asked!r}, without it JAX uses what "
            "is there"
        ) from error


def _mallopt(**options: int) -> None:
    """Set options of glibc's malloc, if the system has it (mallopt(3))."""
    names = {"trim_threshold": -1, "mmap_max": -4, "arena_max": -8}
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in options.items():
            mallopt(names[name], value)


def keep_freed_memory() -> None:
    """Start JAX on a CPU so that glibc's malloc keeps freed memory for later allocations.

    By default malloc returns large blocks to the system, and each call of a compiled program on a
    CPU allocates its work space anew: 186,000 page faults in a training step of a small CIFAR-10
    network (docs/speed.md). Arenas of threads return large blocks whatever the options are, so
    JAX's threads, which start here, get no arenas. Threads that start later do, since threads that
    compile would otherwise wait for each other.

    Call it after `prepare`, and after the processes of a run have connected.
    """
    if not _runs_on_cpu():
        return
    import jax
    import jax.numpy as jnp

    _mallopt(trim_threshold=2**31 - 1, mmap_max=0, arena_max=1)
    square = jnp.ones((512, 512))  # a product that is shared between the threads
    jax.block_until_ready(square @ square)
    _mallopt(arena_max=0)


def _show_unless_of_a_closed_loop(unraisable: "sys.UnraisableHookArgs") -> None:
    """Show an exception that nothing can raise, unless it is that of a reader's closed event loop.

    Of a damaged checkpoint TensorStore's threads report to Orbax's loop after it has ended.
    `runtime.checkpointing` tells of the damage.
    """
    if "Event loop is closed" not in repr(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def hide_gpus_from_tensorflow() -> None:
    """Hide the GPUs from TensorFlow, which prepares data sets.

    It would take the memory that JAX leaves. Call this before TensorFlow is used.

    Raises:
      ImportError: TensorFlow is not installed.
    """
    import tensorflow as tf

    # It can't be told any more if it has started on a GPU already.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")


def prepare() -> None:
    """Set XLA's flags for this version, cache compiled programs, and log only our own lines.

    Call it before JAX is first used, since JAX reads the flags then.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {cpu_flags()}".strip()
    _keep_programs()
    _watch_cache()
    _listen()
    sys.unraisablehook = _show_unless_of_a_closed_loop
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax would show a traceback for a full disk
    logging.basicConfig(force=True)
    logging.root.handlers[0].setFormatter(_OneLine("%(asctime)s %(message)s", "%H:%M:%S"))
