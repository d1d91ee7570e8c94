"""Arrays as a data set: their shape, units and labels, from files to samples and scores."""

import json
import math
import tracemalloc

import numpy as np
import pytest
import scipy.stats
from PIL import Image

import build
import datasets
import run_lib
from build import with_data_facts
from configs.data import data_spec
from configs.errors import UserError
from configs.shapes import image_shape
from configs.vp import array_st
from controllable_generation import read_mask
from data import pixels
from evaluation import evaluate
from metrics import bits_per_dim
from metrics.report import channel_moments
from runtime.pictures import save_grid
from runtime.workdir import PartialResults
from tests.helpers import sample_run


def array_config(path, **data):
    """A config for the arrays at a path, with a tiny network."""
    config = array_st.get_config()
    config.data.update(path=str(path), **data)
    config.model.update(nf=4, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), dropout=0.0)
    config.training.update(
        batch_size=4,
        n_iters=2,
        log_freq=2,
        eval_freq=2,
        snapshot_freq=2,
        snapshot_freq_for_preemption=2,
        snapshot_sampling=False,
    )
    config.sampling.update(num_steps=2, n_images=3, batch_size=2)
    config.eval.update(num_samples=4, num_test_data=3, batch_size=4, nll_steps=32, nelbo_draws=1)
    return config


def saved(path, array):
    np.save(path, array)
    return path


def fields(count=20, shape=(6, 10)):
    return np.random.default_rng(0).normal(280, 15, (count, *shape)).astype(np.float32)


def levels(count=20, shape=(8, 8), most=999, dtype=np.uint16):
    values = np.random.default_rng(1).integers(0, most + 1, (count, *shape))
    values.flat[0] = most
    return values.astype(dtype)


def test_floats_are_scaled_by_the_training_images_and_come_back(tmp_path):
    array = fields()
    config = with_data_facts(array_config(saved(tmp_path / "a.npy", array)), tmp_path / "no run")
    data = datasets.load_data(config)
    is_test = np.arange(20) % 10 == 9
    assert tuple(config.data.scale) == (array[~is_test].min(), array[~is_test].max())
    assert image_shape(config) == (6, 10, 1) and config.data.dequantization == "none"
    train = data.train.source.fetch(np.arange(18))["image"]
    assert train.dtype == np.float32 and train.min() == 0 and train.max() == 1
    spec = data_spec(config)
    units, preprocessing = pixels.get_units(spec), pixels.get_preprocessing(spec)
    assert np.allclose(units.to_files(train)[..., 0], array[~is_test], rtol=0, atol=1e-4)
    x0 = preprocessing.to_x0_without_noise(train)
    assert x0.min() == -1 and x0.max() == 1
    assert np.allclose(preprocessing.to_levels(x0 * 1.5), 1.5 * train - 0.25, atol=1e-6)


def test_each_channel_of_floats_has_its_own_scale(tmp_path):
    array = fields(shape=(4, 6, 3)) * np.array([1, 1e-4, 50], np.float32)
    config = with_data_facts(array_config(saved(tmp_path / "a.npy", array)), tmp_path / "no run")
    train = datasets.load_data(config).train.source.fetch(np.arange(18))["image"]
    assert np.allclose(train.min(axis=(0, 1, 2)), 0) and np.allclose(train.max(axis=(0, 1, 2)), 1)
    of_train = array[np.arange(20) % 10 != 9]
    back = pixels.get_units(data_spec(config)).to_files(train)
    assert np.allclose(back, of_train, rtol=1e-6)
    widths = np.ptp(of_train.astype(np.float64), axis=(0, 1, 2))
    offset = pixels.get_preprocessing(data_spec(config)).bits_offset
    assert np.isclose(offset, np.log2(widths / 2).mean())
    config = array_config(tmp_path / "a.npy", scale=(0.0, (300.0, 1.0, 2e4)))
    scaled = with_data_facts(config, tmp_path / "no run")
    train = datasets.load_data(scaled).train.source.fetch(np.arange(18))["image"]
    assert np.allclose(train, of_train / np.array([300, 1, 2e4]), rtol=1e-5)
    config.data.scale = (0.0, (300.0, 1.0))
    with pytest.raises(UserError, match="has 3 channels"):
        with_data_facts(config, tmp_path / "no run")
    array[..., 1] = 4
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match="no other value than 4 in channel 1"):
        with_data_facts(array_config(tmp_path / "a.npy"), tmp_path / "no run")


def test_bits_of_floats_are_densities_in_their_own_units(tmp_path):
    config = with_data_facts(array_config(saved(tmp_path / "a.npy", fields())), tmp_path / "no run")
    low, high = config.data.scale
    x = np.linspace(-1, 1, 7)
    value = low + (high - low) * (x + 1) / 2
    in_units = -scipy.stats.norm(280, 15).logpdf(value) / math.log(2)
    scaled = scipy.stats.norm((280 - low) / (high - low) * 2 - 1, 15 / (high - low) * 2)
    offset = pixels.get_preprocessing(data_spec(config)).bits_offset
    assert np.allclose(-scaled.logpdf(x) / math.log(2) + offset, in_units)


@pytest.mark.parametrize(
    ("array", "num_levels", "shape"),
    [
        (levels(), 1000, (8, 8, 1)),
        (levels(most=16, dtype=np.uint8), 17, (8, 8, 1)),
        (levels(shape=(8, 4, 7), most=255, dtype=np.uint8), 256, (8, 4, 7)),
    ],
)
def test_the_number_of_levels_is_read(array, num_levels, shape, tmp_path):
    config = with_data_facts(array_config(saved(tmp_path / "a.npy", array)), tmp_path / "no run")
    assert config.data.num_levels == num_levels and image_shape(config) == shape
    images = datasets.load_data(config).train.source.fetch(np.arange(18))["image"]
    preprocessing = pixels.get_preprocessing(data_spec(config))
    assert images.dtype == preprocessing.dtype == array.dtype
    back = preprocessing.to_levels(preprocessing.to_x0_without_noise(images))
    assert back.dtype == array.dtype and np.array_equal(back, images)
    assert np.array_equal(pixels.get_units(data_spec(config)).to_files(images), images)


def test_files_are_mapped_and_not_read_whole(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (200, 512, 512))
    array[10] = 7
    array.flush()
    tracemalloc.start()
    config = with_data_facts(array_config(tmp_path / "a.npy"), tmp_path / "no run")
    image = datasets.load_data(config).train.source.fetch(np.array([9]))["image"]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (image == 7).all() and config.data.num_levels == 8
    assert most < array.nbytes / 2  # it is scanned in parts of 8 MiB


def write_labelled_npz(path):
    np.savez(path / "a.npz", images=levels(), labels=np.arange(20) % 3)
    return path / "a.npz"


def write_split_npz(path):
    np.savez(
        path / "a.npz",
        x_train=levels(),
        y_train=np.arange(20) % 3,
        x_test=levels(),
        y_test=[0] * 20,
    )
    return path / "a.npz"


def write_two_files(path):
    for name in ("train", "test"):
        np.save(path / f"{name}.npy", levels())
        np.save(path / f"{name}_labels.npy", np.arange(20) % 3)
    return path


def write_a_file_each(path):
    for i, example in enumerate(levels()):
        (path / str(i % 3)).mkdir(exist_ok=True)
        np.save(path / str(i % 3) / f"{i:03}.npy", example)
    return path


def write_a_file_each_in_splits(path):
    for name in ("train", "test"):
        (path / name).mkdir()
        write_a_file_each(path / name)
    return path


@pytest.mark.parametrize(
    ("write", "counts"),
    [
        (write_labelled_npz, (18, 2)),
        (write_split_npz, (20, 20)),
        (write_two_files, (20, 20)),
        (write_a_file_each, (18, 2)),
        (write_a_file_each_in_splits, (20, 20)),
    ],
)
def test_labels_and_splits_of_each_layout(write, counts, tmp_path):
    config = array_config(write(tmp_path))
    config.model.num_classes = -1
    config = with_data_facts(config, tmp_path / "no run")
    data = datasets.load_data(config)
    assert (len(data.train), len(data.test)) == counts
    assert data.train.num_classes == config.model.num_classes == 3
    found = data.train.source.fetch(np.arange(counts[0]))
    by_image = {image.tobytes(): i % 3 for i, image in enumerate(levels())}
    assert [by_image[image.tobytes()] for image in found["image"]] == list(found["label"])


def test_padding_repeats_the_edge_and_is_cut_off(tmp_path):
    array = levels(shape=(5, 7, 2), most=255, dtype=np.uint8)
    config = array_config(saved(tmp_path / "a.npy", array), pad=True)
    config = with_data_facts(config, tmp_path / "no run")
    assert image_shape(config) == (6, 8, 2)
    images = datasets.load_data(config).train.source.fetch(np.arange(3))["image"]
    assert np.array_equal(images[:, 5], images[:, 4]) and np.array_equal(
        images[:, :, 7], images[:, :, 6]
    )
    units = pixels.get_units(data_spec(config))
    assert np.array_equal(units.to_files(images), array[:3])
    assert units.to_pictures(images).shape == (3, 5, 14, 1)
    mask = read_mask("left", (5, 7), (6, 8))[..., 0]
    assert mask[:5, :3].all() and not mask[:5, 3:7].any() and mask[5].all() and mask[:, 7].all()


def test_pictures_show_the_chosen_channels(tmp_path):
    array = levels(shape=(4, 4, 5), most=255, dtype=np.uint8)
    config = array_config(saved(tmp_path / "a.npy", array))
    config.sampling.show_channels = (4, 0, 2)
    config = with_data_facts(config, tmp_path / "no run")
    pictures = pixels.get_units(data_spec(config)).to_pictures(array)
    assert np.array_equal(pictures, array[..., [4, 0, 2]])
    config.sampling.show_channels = ()
    wide = pixels.get_units(data_spec(config)).to_pictures(array.repeat(2, axis=0))
    save_grid(wide, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert wide.shape == (40, 4, 20, 1) and 0.5 < grid.width / grid.height < 2


def test_moments_of_channels_are_exact():
    values = np.random.default_rng(0).normal([1e6, 2], [1, 5], (40, 3, 3, 2))
    found = channel_moments(iter([values[:7], values[7:]]), lambda batch: batch)
    assert np.allclose(found["mean"], values.mean(axis=(0, 1, 2)), rtol=1e-12)
    assert np.allclose(found["std"], values.std(axis=(0, 1, 2)), rtol=1e-9)


def with_nan():
    array = fields()
    array[13, 2, 3] = np.nan
    return array


def with_inf():
    array = fields()
    array[19, 0, 0] = -np.inf
    return array


@pytest.mark.parametrize(
    ("array", "changes", "words"),
    [
        (with_nan(), {}, "NaN or infinite values in example 13"),
        (with_inf(), {}, "NaN or infinite values in example 19"),
        (fields(shape=(6,)), {}, r"\(6,\); uint8, uint16 or floats of \(H, W\)"),
        (fields(shape=(2, 2, 2, 2)), {}, "uint8, uint16 or floats"),
        (levels().astype(np.int64), {}, "int64"),
        (fields().astype(object), {}, "it has objects"),
        (np.ones((20, 4, 4), np.float32), {}, "no other value than 1"),
        (np.zeros((20, 4, 4), np.uint8), {}, "no other value than 0"),
        (fields(9), {}, "9 examples; 10 or more"),
        (fields(), {"scale": (3.0, 1.0)}, "its first number must be smaller"),
        (fields(), {"scale": (3.0,)}, "it must be two numbers"),
        (fields(), {"num_levels": 9}, "data.num_levels is for whole numbers"),
        (levels(), {"num_levels": 9}, "has the level 999"),
        (levels(), {"num_levels": -1}, "it must be 2 to 65536"),
        (levels(), {"scale": (0.0, 9.0)}, "data.scale is for floats"),
    ],
)
def test_arrays_that_do_not_fit_get_one_line(array, changes, words, tmp_path):
    config = array_config(saved(tmp_path / "a.npy", array), **changes)
    with pytest.raises(UserError, match=words) as error:
        with_data_facts(config, tmp_path / "no run")
    assert "\n" not in str(error.value)


def test_labels_that_do_not_fit_get_one_line(tmp_path):
    np.savez(tmp_path / "a.npz", images=levels(), labels=np.arange(19))
    with pytest.raises(UserError, match="20 images and labels of int64"):
        with_data_facts(array_config(tmp_path / "a.npz"), tmp_path / "no run")
    with pytest.raises(UserError, match=r"needs data\.path"):
        with_data_facts(array_config(""), tmp_path / "no run")
    with pytest.raises(UserError, match=r"no \.npy or \.npz file"):
        with_data_facts(array_config(tmp_path / "missing.npy"), tmp_path / "no run")
    for i in range(10):
        np.save(tmp_path / f"{i}.npy", levels(1, (4 + i // 9, 4))[0])
    with pytest.raises(UserError, match=r"9\.npy has another shape"):
        with_data_facts(array_config(tmp_path), tmp_path / "no run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "the data are 5×7; .* multiple of 2: 4 or 6 for 5 and 6 or 8 for 7; or .*data.pad"),
        ({"data.pad": True, "sampling.format": "png"}, "it must be npz or npy"),
        ({"data.pad": True, "sampling.show_channels": (0, 1)}, "one channel or three"),
        ({"data.pad": True, "sampling.show_channels": (1,)}, "the data's channels are 0 to 0"),
        ({"data.pad": True, "eval.truncated_normal": True}, "the data are floats"),
    ],
)
def test_options_that_arrays_do_not_have_get_one_line(changes, words, tmp_path):
    config = array_config(saved(tmp_path / "a.npy", fields(shape=(5, 7))))
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        run_lib.train(config, tmp_path / "run")


@pytest.mark.usefixtures("small_network_here")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("array", "changes"),
    [
        (fields(shape=(4, 6, 7)), {}),
        (levels(shape=(5, 7)), {"data.pad": True}),
    ],
    ids=["floats of seven channels", "padded levels"],
)
def test_a_run_on_arrays(array, changes, tmp_path):
    config = array_config(saved(tmp_path / "a.npy", array))
    config.update_from_flattened_dict(changes)
    run, shape = tmp_path / "run", (*array.shape[1:], 1)[:3]
    run_lib.train(config, run)
    own = json.loads((run / "config.json").read_text())["data"]
    assert bool(own["scale"]) == (array.dtype == np.float32)
    if shape[2] == 7:
        config.eval.enable_fid = True
        with pytest.raises(UserError, match="Inception takes images of 1 or 3 channels, not of 7"):
            evaluate(config, run)
        config.eval.enable_fid = False
    report = evaluate(config, run)
    assert np.isfinite([report["nll"], report["nelbo"], report["nll_untrained_network"]]).all()
    moments = report["channels_of_test_images"]
    tests = array[np.arange(20) % 10 == 9].reshape(-1, shape[2])
    assert np.allclose(moments["mean"], tests.mean(axis=0), rtol=1e-5)
    assert np.allclose(moments["std"], tests.std(axis=0), rtol=1e-3)
    sample_run(config, run)
    with np.load(run / "samples" / "samples.npz") as file:
        samples = file["samples"]
    assert samples.shape == (3, *shape) and samples.dtype == array.dtype
    config.eval.samples = str(run / "samples" / "samples.npz")
    assert evaluate(config, run)["num_samples"] == 3
    config.eval.samples, config.eval.images = "", str(tmp_path / "a.npy")
    assert evaluate(config, run)["num_test_images"] == 20
    config.eval.images = ""
    config.sampling.update(task="inpaint", method="pc", n_images=2)
    config.model.num_scales = 3
    sample_run(config, run)
    with np.load(run / "samples" / "inpaint.npz") as file:
        originals, known = file["originals"], file["known"]
    assert originals.dtype == array.dtype
    assert np.array_equal(originals[:, :, : shape[1] // 2], known[:, :, : shape[1] // 2])


@pytest.mark.usefixtures("small_network_here")
@pytest.mark.slow
def test_padded_floats_have_no_density(tmp_path):
    config = array_config(saved(tmp_path / "a.npy", fields(shape=(5, 7))), pad=True)
    run_lib.train(config, tmp_path / "run")
    with pytest.raises(UserError, match="padded floats have no bits/dim"):
        evaluate(config, tmp_path / "run")
    config.eval.enable_bpd = False
    assert "channels" in evaluate(config, tmp_path / "run")
    config.eval.samples = str(tmp_path / "missing.npz")
    with pytest.raises(UserError, match=r"missing\.npz is no \.npy or \.npz file"):
        evaluate(config, tmp_path / "run")


def test_bits_with_their_padding_are_no_fewer_than_the_images_have(tmp_path):
    # Independent levels have 4 bits each. Half of the pixels of each padded image are copies.
    array = levels(count=200, shape=(3, 3), most=15, dtype=np.uint8)
    config = array_config(saved(tmp_path / "a.npy", array), pad=True)
    config.model.ch_mult = (1, 1, 1)
    config = with_data_facts(config, tmp_path / "no run")
    data = datasets.load_data(config)
    assert image_shape(config) == (4, 4, 1)
    assert bits_per_dim._gaussian_baseline(build.set_up(config), data, 20).mean() > 4
    # What a network says of each dimension counts 16/9 times.

    def two_bits(params, keys, image_keys, x, plain, labels):
        return {name: np.full(len(x), 2.0) for name in ("nll", "nelbo", "nfe")}

    setup = build.set_up(config)
    results = PartialResults(tmp_path / "parts")
    evaluated = bits_per_dim.BitsEvaluation(setup, data, results, two_bits)
    values = bits_per_dim.bits_of_images(evaluated, {"w": np.zeros(1)})
    assert np.allclose(values["nll"], 2 * 16 / 9) and np.allclose(values["nelbo"], 2 * 16 / 9)
    assert (values["nfe"] == 2).all()
    # The bound of several draws is of the whole padded image, 16 dimensions, in bits per each of 9.
    draws = np.array([[2.0], [3.0]]) * 16 / 9
    weighted = bits_per_dim.weighted_draws(setup, {"nll_truncated_normal": draws})
    likelihoods = 2.0 ** -np.array([2 * 16, 3 * 16])
    np.testing.assert_allclose(weighted, -np.log2(likelihoods.mean()) / 9, rtol=1e-12)
