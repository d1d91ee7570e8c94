"""A trained model as one object in Python."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import run_lib
import soft_truncation as st
from tests.helpers import sample_run, tiny_config

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_network):
    folder = tmp_path_factory.mktemp("st") / "run"
    config = tiny_config(n_iters=4, snapshot_freq=4)
    config.model.num_classes = 10
    config.sampling.update(method="dpm_solver", num_steps=4, n_images=6, batch_size=6)
    run_lib.train(config, folder)
    return config, folder


@pytest.fixture(scope="module")
def model(run):
    return st.load(run[1])


def test_samples_are_those_of_the_command_line(run, model):
    config, folder = run
    sample_run(config, folder)
    kept = np.load(folder / "samples" / "samples.npz")
    images = model.sample(6, seed=config.seed)
    assert images.dtype == np.uint8 and images.shape == (6, 8, 8, 1)
    np.testing.assert_array_equal(images, kept["samples"])
    np.testing.assert_array_equal(model.sample(6, seed=config.seed, batch_size=6)[:2], images[:2])
    assert (model.sample(6, seed=1) != images).any()
    heun = model.sample(2, seed=config.seed, labels=[3, 4], method="heun", steps=3)
    assert heun.shape == (2, 8, 8, 1)
    states = model.sample(6, seed=config.seed, keep=3)
    assert states.shape == (3, *images.shape) and states.dtype == np.uint8
    np.testing.assert_array_equal(states[-1], images)
    config.sampling.keep = 4
    sample_run(config, folder)
    assert Image.open(folder / "samples" / "chain.gif").n_frames == 4
    assert Image.open(folder / "samples" / "chain.png").size == (4 * 50 + 2, 6 * 50 + 2)


def test_bits_have_errors_and_depend_on_the_image_alone(model):
    images = model.sample(4)
    bits = model.bits_per_dim(images, labels=[0, 1, 2, 3], draws=2)
    assert bits["nll"].shape == (4,) and (bits["nll_stderr"] > 0).all()
    again = model.bits_per_dim(images[1:2], labels=1, draws=2)
    np.testing.assert_allclose(again["nll"][0], bits["nll"][1], atol=1e-4)
    other = model.bits_per_dim(images[1:2], draws=2)
    assert abs(other["nll"][0] - bits["nll"][1]) > 1e-5


def test_decoding_is_the_inverse_of_encoding(model):
    images = model.sample(3)
    z = model.encode(images, labels=2)
    assert z.shape == (3, 8, 8, 1) and 0.5 < float(jnp.std(z)) < 2
    np.testing.assert_array_equal(model.decode(z, labels=2), images)
    between = model.interpolate(images[0], images[1], 3)
    z = model.encode(images[:2])
    np.testing.assert_array_equal(between[[0, 2]], model.decode(z))


def test_denoising_at_a_time_and_at_a_noise_level_agree(model):
    sde, x0 = model.setup.sde, model.to_x(model.sample(2))
    t = jnp.array([0.1, 0.6])
    z = jax.random.normal(jax.random.key(0), x0.shape)
    alpha, std = sde.mean_coeff(t), sde.std(t)
    x_t = x0 * alpha[:, None, None, None] + z * std[:, None, None, None]
    at_t = jax.jit(model.denoise)(x_t, t)
    sigma = std / alpha
    at_sigma = model.denoise(x0 + z * sigma[:, None, None, None], sigma=sigma)
    np.testing.assert_allclose(at_t, at_sigma, atol=2e-4)
    score = jax.jit(model.score)(x_t, t)
    tweedie = (x_t + std[:, None, None, None] ** 2 * score) / alpha[:, None, None, None]
    np.testing.assert_allclose(at_t, tweedie, atol=1e-5)
    low, high = model.sigma_range
    assert low < 0.01 and high > 100
    with pytest.raises(TypeError):
        model.denoise(x_t)


def test_what_is_known_stays_and_a_little_noise_changes_little(model):
    images = model.sample(2)
    mask = np.zeros((8, 8), bool)
    mask[:, 4:] = True
    filled = model.inpaint(images, mask, steps=4)
    np.testing.assert_array_equal(filled[:, :, :4], images[:, :, :4])
    assert (filled[:, :, 4:] != images[:, :, 4:]).any()
    near, far = (model.edit(images, t).astype(int) - images for t in (1e-4, 0.9))
    assert abs(near).mean() < 8 < abs(far).mean()


def test_a_model_says_what_it_is(model):
    assert repr(model).startswith("<Model of digits 8×8×1, 10 classes: ncsnpp, step 4, σ from 0.0")


def test_mistakes_are_told_in_a_line(run, model, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    fields = json.loads((run[1] / "config.json").read_text())
    fields["training"]["prior"], fields["config_file"] = "mine", "/mine/my_config.py"
    (own / "config.json").write_text(json.dumps(fields))
    with pytest.raises(st.UserError, match=r"if /mine/my_config\.py registers it, import"):
        st.load(own)
    with pytest.raises(st.UserError, match=r"has no checkpoint of step 7; there are: 3, 4$"):
        st.load(run[1], step=7)
    with pytest.raises(st.UserError, match="has no run and no exported model"):
        st.load(tmp_path / "typo")
    with pytest.raises(st.UserError, match=r"images are \(N, \*\(8, 8, 1\)\), not \(8, 8\)"):
        model.encode(np.zeros((8, 8), np.uint8))
    with pytest.raises(st.UserError, match=r"the mask must be \(8, 8\) or"):
        model.inpaint(np.zeros((2, 8, 8, 1), np.uint8), np.zeros((8, 8, 1)))
    with pytest.raises(st.UserError, match="images must be uint8"):
        model.bits_per_dim(np.zeros((1, 8, 8, 1)))
    with pytest.raises(st.UserError, match="told labels below 10"):
        model.encode(np.zeros((1, 8, 8, 1), np.uint8), labels=10)
