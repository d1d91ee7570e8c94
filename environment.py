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


def prepare() -> None:
    """Set XLA's flags for this version, keep programs, and have only our own lines in the log.

    JAX reads the flags when it is first used, which may not be earlier than this.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # On a CPU, these versions' new convolutions are up to twice as slow as the old ones.
        # Another version that does not know the flag would stop.
        os.environ["XLA_FLAGS"] = " ".join(
            [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_experimental_ynn_fusion_type="]
        )
    _keep_programs()
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax would show a traceback for a full disk
    # The same: what Orbax's threads can't raise anywhere, they would show.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
