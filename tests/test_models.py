import jax
import jax.numpy as jnp
import numpy as np
import pytest

import import_checkpoint
import sde_lib
from configs.vp import cifar10_st
from models import utils as mutils
from tests.helpers import GOLDEN, golden_config, nhwc, tiny_config


def test_cifar10_network_has_the_official_size():
    config = cifar10_st.get_config()
    model = mutils.create_model(config)
    shapes = jax.eval_shape(lambda: mutils.init_params(config, model, jax.random.key(0)))
    assert mutils.count_params(shapes) == 61_804_419


@pytest.fixture(scope="module")
def golden():
    config = golden_config("vp_ddpmpp")
    params, ema_params, step = import_checkpoint.load(GOLDEN / "vp_ddpmpp.pth", config)
    assert step == 1234
    return config, mutils.create_model(config), params, ema_params


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def test_golden_scores(golden):
    config, model, params, ema_params = golden
    data, sde = np.load(GOLDEN / "vp_ddpmpp.npz"), sde_lib.get_sde(config)
    x, t = nhwc(data["x_t"]), jnp.asarray(data["t"])
    for weights, name in ((params, "score"), (ema_params, "score_ema")):
        score = jax.jit(mutils.get_score_fn(config, sde, model, weights))(x, t)
        assert relative_error(score, nhwc(data[name])) < 1e-5
    out = model.apply({"params": params}, x, jnp.asarray(data["labels"]), train=False)
    assert relative_error(out, nhwc(data["model_out"])) < 1e-5


def test_bfloat16_computes_the_same_function(golden):
    config, model, params, _ = golden
    data = np.load(GOLDEN / "vp_ddpmpp.npz")
    config = config.copy_and_resolve_references()
    config.model.dtype = "bfloat16"
    half = mutils.create_model(config)
    args = ({"params": params}, nhwc(data["x_t"]), jnp.asarray(data["labels"]))
    out = half.apply(*args)
    assert out.dtype == jnp.float32
    error = relative_error(out, np.asarray(model.apply(*args)))
    assert 1e-5 < error < 0.05  # not the same computation, but the same function
    fresh = mutils.init_params(config, half, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}


def test_dropout_of_an_image_depends_on_its_own_key_alone():
    config = tiny_config()
    config.model.update(dropout=0.5, init_scale=1.0)
    model, sde = mutils.create_model(config), sde_lib.get_sde(config)
    params = mutils.init_params(config, model, jax.random.key(0))
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
