import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu.parameter_overview import count_parameters

import sde_lib
from configs.ve import cifar10_ncsnpp_st
from configs.vp import cifar10_st
from models import layers, ncsnv2
from models import utils as mutils
from official import import_checkpoint
from tests.helpers import (
    GOLDEN,
    GOLDEN_MODELS,
    golden_config,
    nhwc,
    param_shapes,
    random_params,
    score_model,
    tiny_config,
)


def num_params(config):
    return count_parameters(param_shapes(config))


def test_cifar10_network_has_the_official_size():
    assert num_params(cifar10_st.get_config()) == 61_804_419


@pytest.fixture(
    scope="module",
    params=[
        GOLDEN_MODELS[0],
        *(pytest.param(name, marks=pytest.mark.slow) for name in GOLDEN_MODELS[1:]),
    ],
)
def golden(request):
    config = golden_config(request.param)
    params, ema_params, step = import_checkpoint.load(GOLDEN / f"{request.param}.pth", config)
    assert step == 1234
    return request.param, config, mutils.create_model(config), params, ema_params


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def test_golden_scores(golden):
    name, config, model, params, ema_params = golden
    data, sde = np.load(GOLDEN / f"{name}.npz"), sde_lib.get_sde(config)
    x, t = nhwc(data["x_t"]), jnp.asarray(data["t"])
    np.testing.assert_allclose(sde.std(t), data["std"], rtol=2e-6)
    # The release's float32 loses digits of the unbounded parametrisation's time.
    tolerance = 5e-4 if name == "vp_uddpmpp" else 2e-5

    @jax.jit
    def score_of(weights):
        return mutils.get_score_fn(config, sde, model, weights)(x, t)

    for weights, field in ((params, "score"), (ema_params, "score_ema")):
        assert relative_error(score_of(weights), nhwc(data[field])) < tolerance
    out = jax.jit(model.apply)({"params": params}, x, jnp.asarray(data["labels"]))
    assert relative_error(out, nhwc(data["model_out"])) < 1e-5


# These two have every layer.
@pytest.mark.slow
@pytest.mark.parametrize("golden", ["vp_ddpmpp", "ve_ncsnpp_skip"], indirect=True)
def test_bfloat16_computes_the_same_function(golden):
    name, config, model, params, _ = golden
    data = np.load(GOLDEN / f"{name}.npz")
    config = config.copy_and_resolve_references()
    config.model.dtype = "bfloat16"
    half = mutils.create_model(config)
    args = ({"params": params}, nhwc(data["x_t"]), jnp.asarray(data["labels"]))
    out = jax.jit(half.apply)(*args)
    assert out.dtype == jnp.float32
    error = relative_error(out, np.asarray(jax.jit(model.apply)(*args)))
    assert 1e-5 < error < 0.05  # not the same computation, but the same function
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(param_shapes(config))}
    assert dtypes == {jnp.dtype("float32")}


OPTIONS = {
    "ddpm blocks": {"resblock_type": "ddpm", "skip_rescale": False},
    "ddpm blocks without convolutions": {"resblock_type": "ddpm", "resamp_with_conv": False},
    "ddpm blocks, FIR": {"resblock_type": "ddpm", "fir": True},
    "residual pyramids, FIR": {
        "progressive": "residual",
        "progressive_input": "residual",
        "fir": True,
    },
    "residual pyramids": {"progressive": "residual", "progressive_input": "residual"},
    "skips, concatenated": {
        "progressive": "output_skip",
        "progressive_input": "input_skip",
        "progressive_combine": "cat",
    },
    "Fourier features": {"fourier_feature": True},
    "Fourier embedding": {"embedding_type": "fourier"},
    "patches": {"patch_size": 2},
    "patches, Fourier features, pyramids": {
        "patch_size": 2,
        "fourier_feature": True,
        "progressive": "output_skip",
        "progressive_input": "input_skip",
    },
    "DDPM": {"name": "ddpm"},
}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_options_make_another_network_that_learns(option):
    config = tiny_config()
    config.model.update(nf=8, ch_mult=(1, 2), attn_resolutions=(4,), init_scale=1.0)
    plain = num_params(config)
    config.model.update(OPTIONS[option])
    model, sde = mutils.create_model(config), sde_lib.get_sde(config)
    params = random_params(config)
    changes_no_shape = option == "Fourier embedding"  # but has frequencies
    assert count_parameters(params) != plain or changes_no_shape
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))

    def loss(params):
        score = mutils.get_score_fn(config, sde, model, params)(x, jnp.array([0.1, 0.9]))
        assert score.shape == x.shape
        return jnp.mean(score**2)

    gradients = jax.jit(jax.grad(loss))(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        fixed = "GaussianFourierProjection" in str(path[0])
        assert jnp.isfinite(gradient).all()
        assert fixed == bool((gradient == 0).all()), path


def dense_fir(x, kernel, up, down, padding):
    """The definition: zero-insertion, padding, convolution, decimation; one image, one channel."""
    taps = np.asarray(kernel, float) / sum(kernel)
    wide = np.zeros((x.shape[0] * up, x.shape[1] * up))
    wide[::up, ::up] = x
    wide = np.pad(wide, padding)
    window = np.outer(taps, taps)[::-1, ::-1] * up**2
    rows, columns = (n - len(taps) + 1 for n in wide.shape)
    out = np.array(
        [
            [(wide[i : i + len(taps), j : j + len(taps)] * window).sum() for j in range(columns)]
            for i in range(rows)
        ]
    )
    return out[::down, ::down]


@pytest.mark.parametrize(
    "kernel",
    [
        (1, 2, 3, 4),
        *(
            pytest.param(k, marks=pytest.mark.slow)
            for k in ((1, 3, 3, 1), (1, 1), (1, 4, 6, 5, 2, 1))
        ),
    ],
)
def test_fir_resampling_is_its_definition(kernel):
    x = np.random.default_rng(0).standard_normal((1, 6, 8, 1)).astype(np.float32)
    rest = len(kernel) - 2
    down = layers.downsample(jnp.asarray(x), kernel)[0, :, :, 0]
    expected = dense_fir(x[0, :, :, 0], kernel, 1, 2, ((rest + 1) // 2, rest // 2))
    np.testing.assert_allclose(down, expected, atol=1e-6)
    up = layers.upsample(jnp.asarray(x), kernel)[0, :, :, 0]
    expected = dense_fir(x[0, :, :, 0], kernel, 2, 1, ((rest + 1) // 2 + 1, rest // 2))
    np.testing.assert_allclose(up, expected, atol=1e-6)


def correlate(weight, x):
    rows, columns = (n - 2 for n in x.shape)
    windows = [[x[i : i + 3, j : j + 3] for j in range(columns)] for i in range(rows)]
    return (np.array(windows) * weight).sum((2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [(1, 3, 3, 1), (1, 2, 3, 4)])
def test_fir_convolutions_are_a_filter_and_a_convolution(kernel):
    x = np.random.default_rng(0).standard_normal((1, 6, 6, 1)).astype(np.float32)
    for up in (True, False):
        module = layers.FIRConv(1, up, kernel)
        params = module.init(jax.random.key(0), jnp.asarray(x))["params"]
        weight = np.asarray(params["kernel"])[:, :, 0, 0]
        out = module.apply({"params": params | {"bias": jnp.array([0.5])}}, jnp.asarray(x))
        if up:
            wide = np.zeros((11, 11))
            wide[::2, ::2] = x[0, :, :, 0]
            expected = 4 * dense_fir(correlate(weight, np.pad(wide, 2)), kernel, 1, 1, (1, 1)) + 0.5
        else:
            expected = (
                correlate(weight, dense_fir(x[0, :, :, 0], kernel, 1, 1, (2, 2)))[::2, ::2] + 0.5
            )
        np.testing.assert_allclose(out[0, :, :, 0], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ncsnv2.STAGES)
def test_ncsnv2_is_a_score_of_any_noise_level(name):
    config = tiny_config(sde="vesde")
    config.model.parametrization = "noise"
    config.data.update(image_size=16, num_channels=3, centered=False)
    config.model.update(name=name, nf=8)
    model, sde = mutils.create_model(config), sde_lib.get_sde(config)
    params = random_params(config)
    score_fn = jax.jit(mutils.get_score_fn(config, sde, model, params))
    x = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3))
    low, high = (score_fn(x, jnp.full(2, t)) for t in (0.2, 0.8))
    assert low.shape == x.shape and jnp.isfinite(low).all()
    # Unconditional, but for the division by σ.
    np.testing.assert_allclose(low * sde.std(0.2), high * sde.std(0.8), rtol=1e-4, atol=1e-6)


def test_ncsnv2_has_the_published_size():
    # For CIFAR-10, in millions.
    config = cifar10_ncsnpp_st.get_config()
    config.model.update(name="ncsnv2_64", nf=128)
    assert round(num_params(config) / 1e6, 1) == 29.7


@pytest.mark.parametrize("pixels", [16, 12, 9, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-4), (jnp.bfloat16, 0.01)])
def test_attention_is_that_of_jax(pixels, dtype, tolerance):
    draw = np.random.default_rng(pixels).standard_normal((4, 3, pixels, 8))
    given = [jnp.asarray(8 * x, dtype) for x in draw]  # scores of up to 100

    def reference(*args):
        return jax.nn.dot_product_attention(*(x[:, :, None, :] for x in args))[:, :, 0, :]

    def with_gradients(attend, args):
        y, pull = jax.vjp(attend, *args[:3])
        return y, *pull(args[3])

    wide = [x.astype(jnp.float32) for x in given]
    scale = float(jnp.linalg.norm(wide[3]))
    for ours, theirs in zip(
        with_gradients(layers.attend, given), with_gradients(reference, wide), strict=True
    ):
        assert ours.dtype == dtype
        error = float(jnp.linalg.norm(ours.astype(jnp.float32) - theirs))
        assert error <= tolerance * max(scale, float(jnp.linalg.norm(theirs)))


@pytest.mark.parametrize(
    "layer",
    [
        layers.Conv(4, dtype=jnp.bfloat16),
        layers.Conv(4, (1, 1), dtype=jnp.bfloat16),
        layers.FIRConv(4, True, (1, 3, 3, 1), jnp.bfloat16),
        layers.Dense(4, dtype=jnp.bfloat16),
        ncsnv2._conv(4, jnp.bfloat16),
    ],
    ids=["3x3", "1x1", "fir", "dense", "ncsnv2"],
)
def test_a_bias_has_its_gradient_in_bfloat16(layer):
    """It is a sum over all pixels of a batch; summed in bfloat16 it would be a third of this."""
    x = jax.random.normal(jax.random.key(0), (128, 32, 32, 4), jnp.bfloat16)
    params = layer.init(jax.random.key(1), x[:1])["params"]
    shape = jax.eval_shape(layer.apply, {"params": params}, x).shape
    dy = 0.1 + jax.random.normal(jax.random.key(2), shape, jnp.bfloat16)

    def loss(params):
        return jnp.mean(dy.astype(jnp.float32) * layer.apply({"params": params}, x))

    assert layer.apply({"params": params}, x[:1]).dtype == jnp.bfloat16
    exact = np.asarray(dy, np.float64).sum((0, 1, 2)) / dy.size
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(params)["bias"], exact, rtol=5e-3)


def test_the_initialisation_is_the_models_own():
    config = tiny_config()
    model, key = mutils.create_model(config), jax.random.key(3)
    size, channels = config.data.image_size, config.data.num_channels
    x = jnp.zeros((1, size, size, channels))
    expected = jax.jit(lambda key: model.init(key, x, jnp.ones(1)))(key)["params"]
    params = mutils.init_params(model, x.shape[1:], key)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, param_shapes(config))


def test_a_1x1_convolution_is_lax_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 5))
    module = layers.Conv(7, (1, 1), gain=0.5)
    kernel, bias = (jax.random.normal(jax.random.key(1), s) for s in ((1, 1, 5, 7), (7,)))
    params = {"params": {"kernel": kernel, "bias": bias}}
    dims = ("NHWC", "HWIO", "NHWC")
    whole = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims) + bias
    np.testing.assert_allclose(module.apply(params, x), 0.5 * whole, atol=1e-5)


def test_instance_norm_plus():
    x = np.random.default_rng(0).standard_normal((3, 4, 5, 6)).astype(np.float32) * 2 + 1
    module = ncsnv2.InstanceNormPlus()
    params = {k: jnp.full(6, v) for k, v in (("alpha", 0.5), ("gamma", 2.0), ("beta", 0.1))}
    means = x.mean((1, 2), keepdims=True)
    normal = (x - means) / np.sqrt(x.var((1, 2), keepdims=True) + 1e-5)
    spread = np.sqrt(means.var(-1, ddof=1, keepdims=True) + 1e-5)
    expected = 2 * (normal + 0.5 * (means - means.mean(-1, keepdims=True)) / spread) + 0.1
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-5)


def test_aligned_corners():
    x = jnp.arange(3.0)[None, :, None, None] * jnp.ones((1, 3, 3, 1))
    out = ncsnv2._resize(x, 9)[0, :, 0, 0]
    np.testing.assert_allclose(out, np.linspace(0, 2, 9), atol=1e-6)


@pytest.mark.slow
def test_a_ve_score_is_divided_by_sigma_in_either_embedding():
    config = tiny_config(sde="vesde")
    config.model.parametrization = "noise"
    config.data.centered = False
    config.model.update(scale_by_sigma=True, init_scale=1.0)
    sde, x, t = sde_lib.get_sde(config), jnp.ones((2, 8, 8, 1)), jnp.array([0.2, 0.9])
    for embedding in ("positional", "fourier"):
        config.model.update(embedding_type=embedding, scale_by_sigma=True)
        model = mutils.create_model(config)
        params = random_params(config)
        divided = jax.jit(mutils.get_score_fn(config, sde, model, params))(x, t)
        config.model.scale_by_sigma = False
        model = mutils.create_model(config)
        plain = jax.jit(mutils.get_score_fn(config, sde, model, params))(x, t)
        std = sde.std(t)[:, None, None, None]
        np.testing.assert_allclose(divided * std, plain, rtol=1e-5, atol=1e-6)


def test_the_time_of_the_positional_embedding_follows_the_clock_of_ve_and_rve():
    config = tiny_config(sde="vesde")
    config.model.parametrization = "noise"
    for name in ("vesde", "reciprocal_vesde"):
        config.training.sde = name
        sde = sde_lib.get_sde(config)
        time_cond = score_model(config, sde, None).time_cond(sde.time_grid(1e-5, 10))
        np.testing.assert_allclose(time_cond, np.linspace(0, 999, 10), atol=0.05)


@pytest.mark.slow
def test_dropout_of_an_image_depends_on_its_own_key_alone():
    config = tiny_config()
    config.model.update(dropout=0.5, init_scale=1.0)
    model, sde = mutils.create_model(config), sde_lib.get_sde(config)
    params = mutils.init_params(model, (8, 8, 1), jax.random.key(0))
    score_fn = mutils.get_score_fn(config, sde, model, params, train=True)
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    t, keys = jnp.full(4, 0.5), jax.random.split(jax.random.key(2), 4)
    together = score_fn(x, t, keys)
    alone = jnp.concatenate([score_fn(x[i : i + 1], t[:1], keys[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)
    same = score_fn(x[:1].repeat(4, 0), t, keys)
    assert all(jnp.abs(same[i] - same[0]).max() > 1e-3 for i in range(1, 4))
    with pytest.raises(ValueError, match="dropout_keys"):
        score_fn(x, t)
    assert score_fn(x, t, jax.random.key(3)).shape == x.shape  # one key serves a batch too


def test_features_of_an_image_and_of_a_time_are_waves_of_their_formulas():
    x = np.random.default_rng(0).random((2, 3)).astype(np.float32)
    waves = [f(scale * np.pi * x) for scale in (128, 256) for f in (np.sin, np.cos)]
    expected = np.concatenate([x, *waves], axis=-1)
    np.testing.assert_allclose(layers.fourier_features(jnp.asarray(x)), expected, atol=1e-4)
    t, frequencies = x[0], np.array([0.5, -3.0], np.float32)
    embedding = layers.GaussianFourierProjection(2, 16.0)
    angles = 2 * np.pi * t[:, None] * frequencies
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    ours = embedding.apply({"params": {"W": frequencies}}, t)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_folded_pixels_are_neighbours_and_unfolding_restores_the_image():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    for size in (1, 2):
        folded = layers.fold(jnp.asarray(x), size)
        assert folded.shape == (2, 4 // size, 6 // size, 3 * size**2)
        np.testing.assert_array_equal(layers.unfold(folded, size), x)
    np.testing.assert_array_equal(folded[1, 0, 2].reshape(2, 2, 3), x[1, :2, 4:6])


def test_patches_of_one_pixel_change_nothing_and_larger_ones_divide_the_image():
    config = tiny_config()
    assert mutils.create_model(config).patch_size == 1
    shape = param_shapes(config)
    config.model.patch_size = 2
    patches = param_shapes(config)
    assert shape["Conv_0"]["kernel"].shape[2:] == (1, config.model.nf)
    assert patches["Conv_0"]["kernel"].shape[2:] == (4, config.model.nf)
    assert patches["Conv_1"]["kernel"].shape[2:] == (config.model.nf, 4)
    assert patches["ResBlock_0"] == shape["ResBlock_0"]


def test_each_layer_drops_values_of_its_own():
    class Layers(nn.Module):
        @nn.compact
        def __call__(self, keys):
            return [layers.DropoutKeys(0.5)(keys) for _ in range(3)]

    words = np.stack(Layers().apply({}, jax.random.split(jax.random.key(0), 4)))
    assert words.shape == (3, 4, 2) and len(np.unique(words.reshape(12, 2), axis=0)) == 12


class _Reached(Exception):
    """What a layer is given, as the network comes to it."""


def given_to_first_layer(kind, config, *args):
    """What a network gives to its first layer of a kind; the rest of it is not computed."""

    def stop(call, own, options, context):
        if isinstance(context.module, kind):
            raise _Reached(*own)
        return call(*own, **options)

    with nn.intercept_methods(stop), pytest.raises(_Reached) as reached:
        mutils.create_model(config).init(jax.random.key(0), *args)
    return reached.value.args[0]


@pytest.mark.parametrize("name", ["ncsnpp", "ncsnv2_64"])
def test_the_first_layer_sees_images_of_the_range_of_centred_ones(name):
    config = tiny_config(sde="vesde")
    config.model.update(name=name, parametrization="noise")
    x, labels = jax.random.uniform(jax.random.key(0), (1, 8, 8, 1)), jnp.ones(1)
    for centered, expected in ((True, x), (False, 2 * x - 1)):
        config.data.centered = centered
        seen = given_to_first_layer(layers.Conv, config, x, labels)
        np.testing.assert_allclose(seen, expected, atol=1e-6)


def test_the_first_layer_of_the_fourier_embedding_sees_log_sigma():
    config = tiny_config(sde="vesde")
    config.model.update(embedding_type="fourier", parametrization="noise")
    sigma = jnp.array([0.01, 50.0])
    seen = given_to_first_layer(
        layers.GaussianFourierProjection, config, jnp.zeros((2, 8, 8, 1)), sigma
    )
    np.testing.assert_allclose(seen, jnp.log(sigma))
