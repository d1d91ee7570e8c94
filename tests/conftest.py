"""Four CPU devices for every test: set before JAX starts."""

import os
import tempfile

from environment import cpu_flags

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=4"
    " --xla_backend_optimization_level=1"  # most programs here run once: compile time counts
    f" {cpu_flags()}"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests, and the processes that they start, compile each program once.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax_cache_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
# Downloads and decoded images of tests are not the user's.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache_")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
