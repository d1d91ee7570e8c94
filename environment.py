"""What a program sets before JAX starts: main.py and the experiments have it in common."""

import importlib.metadata
import logging
import os
import pathlib
import sys

from absl import logging as absl_logging


def cache_dir() -> pathlib.Path:
    """The user's cache folder for this project."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "soft_truncation"


def _keep_programs() -> None:
    """Have JAX keep what it compiles in the user's cache folder, if it can be written to."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    folder = cache_dir() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def cpu_flags() -> str:
    """XLA flags that make training on a CPU faster; empty if this jaxlib may not know them.

    They keep convolutions from YNNPACK, with which gradients take up to twice as long in jaxlib
    0.10, a little longer in 0.12. XLA ends a program that sets a flag unknown to it.
    """
    known = importlib.metadata.version("jaxlib").startswith(("0.10.", "0.12."))
    return "--xla_cpu_experimental_ynn_fusion_type=" if known else ""


def prepare() -> None:
    """Set XLA's flags for this version, keep programs, and have only our own lines in the log.

    JAX reads the flags when it is first used, which may not be earlier than this.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {cpu_flags()}".strip()
    _keep_programs()
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax would show a traceback for a full disk
    # The same: what Orbax's threads can't raise anywhere, they would show.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
