"""The Triton kernels, in Triton's interpreter on a CPU and lowered for an H100 that is not there.

They are skipped where Triton is not installed: `pip install triton jax-triton`.
"""

import importlib
import importlib.util
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import norm_kernels, normalization


class _Buffer:
    """A numpy array, as the part of a torch tensor that Triton's interpreter reads."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    def data_ptr(self):
        return self.array.ctypes.data

    def _same(self, *_, **__):
        return self

    untyped_storage = storage_offset = size = stride = new_empty = cpu = set_ = copy_ = _same


def _interpret(*inputs, kernel, out_shape, grid, name, num_warps, fast, **sizes):
    """`jax_triton.triton_call`, interpreted; the interpreter has no approximate tanh."""
    inputs = [_Buffer(np.array(x)) for x in inputs]
    outputs = [_Buffer(np.full(s.shape, np.nan, s.dtype)) for s in out_shape]
    kernel[grid](*inputs, *outputs, fast=False, **sizes)
    return [jnp.asarray(output.array) for output in outputs]


@pytest.fixture
def interpreted(monkeypatch):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    stand_in = types.ModuleType("jax_triton")
    stand_in.triton_call = _interpret
    monkeypatch.setitem(sys.modules, "jax_triton", stand_in)
    monkeypatch.delitem(sys.modules, "models.norm_triton", raising=False)
    module = importlib.import_module("models.norm_triton")
    monkeypatch.setattr(norm_kernels, "backend", lambda: module)
    yield
    del sys.modules["models.norm_triton"]


# (pixels a side, channels, groups, dropout's rate, with SiLU, with shift, dtype)
CASES = [
    (4, 64, 16, 0.1, True, True, "bfloat16"),
    (8, 32, 8, 0.0, False, False, "float32"),
    (16, 96, 24, 0.6, True, True, "float32"),
    (32, 64, 16, 0.0, True, False, "float32"),
]


@pytest.mark.parametrize(("size", "channels", "groups", "rate", "silu", "shifted", "dtype"), CASES)
def test_they_agree_with_plain_jax_in_float64(
    size, channels, groups, rate, silu, shifted, dtype, interpreted
):
    rng = np.random.default_rng(size)
    options = normalization.Options(groups, silu, rate)
    x = jnp.asarray(rng.normal(1, 2, (2, size, size, channels)), dtype)
    dy = jnp.asarray(rng.normal(size=x.shape), dtype)
    vectors = [jnp.asarray(rng.normal(at, 0.1, channels), jnp.float32) for at in (1, 0)]
    moved = [jnp.asarray(rng.normal(size=(2, channels)), jnp.float32)] if shifted else []
    assert norm_kernels.fits(options, x)
    words = rng.integers(0, 2**32, (2, 2), dtype=np.uint32) if rate else None

    def value_and_grads(function, *inputs):
        def run(*args):
            shift = args[3] if shifted else None
            return function(options, *args[:3], shift, None if words is None else jnp.array(words))

        y, pull = jax.vjp(run, *inputs)
        return [np.asarray(a, np.float64) for a in (y, *pull(jnp.asarray(dy, y.dtype)))]

    ours = value_and_grads(norm_kernels.fused, x, *vectors, *moved)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, *vectors, *moved)]
        exact = value_and_grads(normalization.norm_act, *wide)
    bound = 1e-6 if dtype == "float32" else 4e-3  # the interpreter truncates to bfloat16
    for a, b in zip(ours, exact, strict=True):
        assert np.linalg.norm(a - b) < bound * np.linalg.norm(b)


LOWER = """
import warnings
warnings.simplefilter("error", DeprecationWarning)
import jax, jax.numpy as jnp, jaxlib.gpu_triton
from models import norm_kernels, normalization
jaxlib.gpu_triton.get_compute_capability = lambda device: 90
from models import norm_triton
norm_kernels.backend = lambda: norm_triton
x = jax.ShapeDtypeStruct((2, 16, 16, 64), jnp.bfloat16)
vector = jax.ShapeDtypeStruct((64,), jnp.float32)
options = normalization.Options(16, True, 0.1)
def run(x, *vectors):
    y, pull = jax.vjp(lambda *given: norm_kernels.fused(options, *given), x, *vectors)
    return pull(y)
print(jax.jit(run).trace(x, vector, vector).lower(lowering_platforms=("cuda",)).as_text())
"""


@pytest.mark.slow
def test_they_compile_for_an_h100_without_a_deprecation():
    for plugin in ("jax_triton", "jax_cuda12_plugin"):
        pytest.importorskip(plugin)
    command = [sys.executable, "-c", LOWER]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("@triton_kernel_call") == 2
