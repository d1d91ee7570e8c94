"""Group normalisation is Flax's, its gradients in both modes are, and its kernels agree with it."""

import sys
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import norm_kernels, norm_pallas, normalization
from models.layers import GroupNorm
from tests.helpers import float64

SHAPES = [(2, 16, 16, 32), (3, 7, 5, 12), (1, 1, 1, 8), (2, 4, 6, 160)]


def _reference(channels, silu):
    norm = nn.GroupNorm(num_groups=min(channels // 4, 32), epsilon=1e-6)
    return lambda p, x: nn.silu(norm.apply(p, x)) if silu else norm.apply(p, x)


def _draw(shape, dtype):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(0.5, 1.0, shape), dtype)

    params = {"params": {"scale": draw(shape[-1]), "bias": draw(shape[-1])}}
    return params, draw(*shape), draw(*shape)


def _everything(function, params, x, direction):
    """The output, its gradients, the same under checkpoint, and the derivative along x."""
    y, pull = jax.vjp(function, params, x)
    again = jax.vjp(jax.checkpoint(function), params, x)[1](direction)
    push = jax.jvp(lambda x: function(params, x), (x,), (direction,))
    return y, pull(direction), again, push


@pytest.mark.slow
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_group_norm_is_flax_s_and_so_are_its_gradients(shape, silu, dtype):
    with float64(dtype == "float64"):
        reference = jax.jit(lambda *args: _everything(_reference(shape[-1], silu), *args))
        norm = GroupNorm(silu, dtype=jnp.dtype(dtype))
        ours = jax.jit(lambda *args: _everything(norm.apply, *args))
        args = _draw(shape, dtype)
        tolerance = 1e-9 if dtype == "float64" else 2e-4
        for a, b in zip(*map(jax.tree.leaves, (ours(*args), reference(*args))), strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("silu", [False, True])
def test_some_gradients_alone_are_the_same(silu):
    params, x, direction = _draw((2, 4, 4, 8), jnp.float32)
    apply = GroupNorm(silu).apply
    of_params, of_x = jax.vjp(apply, params, x)[1](direction)
    alone = jax.vjp(lambda params: apply(params, x), params)[1](direction)[0]
    shift = jax.vjp(lambda x: apply(params, x), x)[1](direction)[0]
    for a, b in zip(*map(jax.tree.leaves, ((alone, shift), (of_params, of_x))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_gradients_in_bfloat16_are_those_of_float32_rounded():
    params, x, direction = _draw((2, 8, 8, 32), jnp.float32)
    x, direction = x.astype(jnp.bfloat16), direction.astype(jnp.bfloat16)
    y, pull = jax.vjp(GroupNorm(True, dtype=jnp.bfloat16).apply, params, x)
    exact, exact_pull = jax.vjp(GroupNorm(True).apply, params, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, rtol=1e-2, atol=1e-2)
    for a, b in zip(
        *map(jax.tree.leaves, (pull(direction), exact_pull(direction.astype(jnp.float32)))),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2e-2, atol=2e-2)


KERNEL_SHAPES = [(4, 64, 16), (8, 32, 8), (16, 96, 24), (32, 128, 32), (16, 256, 32)]


def _inputs(size, channels, dtype, n=3):
    keys = jax.random.split(jax.random.key(size * channels), 6)
    x = (2 * jax.random.normal(keys[0], (n, size, size, channels)) + 1).astype(dtype)
    scale = 1 + 0.1 * jax.random.normal(keys[1], (channels,))
    bias = 0.1 * jax.random.normal(keys[2], (channels,))
    shift = jax.random.normal(keys[3], (n, channels))
    words = jax.random.bits(keys[4], (n, 2))
    return (x, scale, bias, shift), words, jax.random.normal(keys[5], x.shape).astype(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("size", "channels", "groups"), KERNEL_SHAPES)
def test_the_kernels_agree_with_plain_jax(size, channels, groups, dtype):
    # On a CPU the kernels are interpreted: the same arithmetic, tile by tile.
    inputs, words, direction = _inputs(size, channels, dtype)
    options = normalization.Options(groups, True, 0.1)
    assert norm_kernels.fits(options, inputs[0])

    def value_and_grads(function):
        y, pull = jax.vjp(lambda *args: function(options, *args, words), *inputs)
        return y, *pull(direction)

    ours, plain = value_and_grads(norm_kernels.fused), value_and_grads(normalization.norm_act)
    for a, b in zip(ours, plain, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) < (1e-6 if dtype == jnp.float32 else 1e-3) * np.linalg.norm(b)


def test_kernels_do_without_silu_shift_and_dropout():
    (x, scale, bias, _), _, direction = _inputs(8, 64, jnp.float32)
    options = normalization.Options(16, False)
    y, pull = jax.vjp(lambda *args: norm_kernels.fused(options, *args), x, scale, bias)
    plain, plain_pull = jax.vjp(
        lambda *args: normalization.norm_act(options, *args), x, scale, bias
    )
    for a, b in zip((y, *pull(direction)), (plain, *plain_pull(direction)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def _training(options, inputs, words, direction):
    def function(*args):
        return norm_kernels.norm_act(options, *args, words, train=True)

    return jax.vjp(function, *inputs)[1](direction)


@pytest.mark.parametrize(("use", "kernels"), [("train", 2), ("forward", 0), ("jvp", 0)])
def test_training_on_a_gpu_gets_the_kernels(use, kernels, monkeypatch):
    pytest.importorskip("jax.experimental.pallas.triton")
    inputs, words, direction = _inputs(16, 64, jnp.bfloat16)
    options = normalization.Options(16, True, 0.1)
    monkeypatch.setattr(norm_kernels.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(norm_kernels, "work", lambda: True)

    def function(*args):
        return norm_kernels.norm_act(options, *args, words)

    uses = {
        "train": lambda *args: _training(options, args, words, direction),
        "forward": function,
        "jvp": lambda *args: jax.jvp(function, args, args),
    }
    # JAX 0.12 lowers a Triton kernel for a GPU that it is told of, if the machine has none.
    h100 = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=h100)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = jax.jit(uses[use]).trace(*inputs)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("gpu.triton") == kernels
    for warning in caught:
        assert str(warning.message).startswith(norm_kernels.DEPRECATED)


@pytest.fixture
def on_gpu(monkeypatch):
    """A GPU, as far as `norm_kernels` is told; what it finds out about its kernels is forgotten."""
    # Lowering for what is a CPU in fact fails as it does for a GPU that Triton does not know.
    monkeypatch.setattr(norm_kernels.jax, "default_backend", lambda: "gpu")
    norm_kernels.work.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield
    norm_kernels.work.cache_clear()


@pytest.mark.parametrize("gone", [False, True])
def test_training_on_a_gpu_is_left_to_xla_where_the_kernels_do_not_work(
    gone, on_gpu, monkeypatch, caplog
):
    inputs, words, direction = _inputs(8, 32, jnp.float32)
    options = normalization.Options(8, True, 0.1)
    expected = jax.jit(
        lambda *args: jax.vjp(lambda *args: normalization.norm_act(options, *args, words), *args)[
            1
        ](direction)
    )(*inputs)
    if gone:
        monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
        monkeypatch.delattr("jax.experimental.pallas.triton", raising=False)
    assert not norm_kernels.work()
    ours = jax.jit(lambda *args: _training(options, args, words, direction))(*inputs)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    (line,) = caplog.messages
    assert "left to XLA" in line and "\n" not in line


def test_the_kernels_are_taken_where_they_work_and_a_deprecation_is_logged_once(
    on_gpu, monkeypatch, caplog
):
    caplog.set_level("INFO")

    def call(direction, options, tile, inputs, outputs):  # kernels whose results are 0
        text = norm_kernels.DEPRECATED + " and will be removed"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return {name: jnp.zeros(x.shape, x.dtype) for name, x in outputs.items()}

    monkeypatch.setattr(norm_pallas, "call", call)
    assert norm_kernels.work()
    inputs, words, _ = _inputs(8, 32, jnp.float32)
    with warnings.catch_warnings(record=True) as caught:
        y = norm_kernels.norm_act(normalization.Options(8, True), *inputs, words, train=True)
    (line,) = caplog.messages
    assert "XLA takes its place" in line and not caught and not y.any()


def test_images_that_do_not_fit_a_tile_are_left_to_xla():
    def fits(size, channels):
        return norm_kernels.fits(
            normalization.Options(min(channels // 4, 32), True),
            jnp.zeros((1, size, size, channels)),
        )

    assert fits(64, 128) and fits(48, 64) and fits(4, 256)
    assert not fits(7, 64) and not fits(16, 384) and not fits(8, 48)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_is_independent_between_places_images_and_keys(rate):
    n, size, channels = 64, 32, 4
    x = jnp.ones((n, size, size, channels))
    options = normalization.Options(1, False, rate)
    draw = jax.jit(
        lambda words: normalization.norm_act(options, x, jnp.zeros(4), jnp.ones(4), None, words)
    )
    masks = np.stack(
        [draw(jax.random.key_data(jax.random.split(jax.random.key(s), n))) != 0 for s in range(2)]
    )
    deviation = np.sqrt(rate * (1 - rate))
    z = (masks - (1 - rate)) / deviation  # mean 0, variance 1, if all is well
    assert abs(z.sum()) < 5 * np.sqrt(z.size)
    for axis in range(z.ndim):  # neighbours along seeds, images, rows, columns and channels
        other = np.roll(z, 1, axis)
        assert abs((z * other).sum()) < 5 * np.sqrt(z.size), axis
    per_place, per_image = z.sum((0, 1)) / np.sqrt(2 * n), z.sum((2, 3, 4)) / np.sqrt(32 * 32 * 4)
    for sums in (per_place, per_image):
        assert abs(sums).max() < 6
        np.testing.assert_allclose(sums.var(), 1, atol=6 * np.sqrt(2 / sums.size))


def test_dropout_keeps_the_mean():
    options, x = normalization.Options(1, False, 0.25), jnp.ones((2, 4, 4, 4))
    words = jax.random.key_data(jax.random.split(jax.random.key(0), 2))
    y = normalization.norm_act(options, x, jnp.zeros(4), jnp.full(4, 3.0), None, words)
    np.testing.assert_allclose(np.unique(y), [0, 4])
