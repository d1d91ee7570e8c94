import gzip
import pathlib
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import datasets
from configs.data import data_spec
from configs.errors import UserError
from configs.vp import celeba_ddpmpp_nll_st, fashion_mnist_st
from data import pixels
from data.batches import Dataset, in_memory, in_order, train_batches
from readers.containers import Folder
from readers.decode import Fit
from readers.image_files import records_of
from readers.source import ArraySource, RecordSource
from tests.helpers import environment_of, tiny_config

ROOT = pathlib.Path(__file__).parents[1]


def test_digits_split_every_image_once():
    train, test = (datasets.get_dataset(tiny_config(), split) for split in ("train", "test"))
    assert (len(train), len(test), train.num_levels) == (1500, 297, 17)
    images = np.concatenate([in_order(d)["image"] for d in (train, test)])
    assert images.dtype == np.uint8 and images.max() == 16
    import sklearn.datasets

    original = sklearn.datasets.load_digits().images.astype(np.uint8)

    def key(x):
        return sorted(row.tobytes() for row in x.reshape(1797, 64))

    assert key(images) == key(original)


def order(count, batch_size, steps, **options):
    """The indices of the images of so many steps' batches, one after the other."""
    source = ArraySource(np.zeros((count, 1, 1, 1), np.uint8), np.zeros(count))
    dataset = Dataset("numbered", source, 256)
    stream = train_batches(dataset, batch_size, indices_only=True, **options)
    return np.concatenate([next(stream)["image"] for _ in range(steps)])


@pytest.mark.parametrize(("count", "batch_size"), [(1500, 64), (7, 32), (64, 32)])
def test_an_epoch_has_every_image_once(count, batch_size):
    found = order(count, batch_size, 3 * count // batch_size + 1, seed=3)[: 3 * count]
    epochs = found.reshape(3, count)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), [np.arange(count)] * 3)
    # Each epoch has an order of its own, and so has each seed.
    orders = {tuple(epoch) for epoch in (*epochs, np.arange(count))}
    for seed in (0, 4, 2**32 - 9):
        orders.add(tuple(order(count, batch_size, count // batch_size + 1, seed=seed)[:count]))
    assert len(orders) == 7


@pytest.mark.parametrize("start_step", [1, 23, 24, 50, 10**9])
def test_a_batch_is_a_function_of_seed_and_step(start_step):
    # 1,500 images are 23.4 batches: most of these steps are within an epoch, 23 is in two.
    around = order(1500, 64, 5, seed=3, start_step=start_step - 1)
    again = order(1500, 64, 1, seed=3, start_step=start_step)
    np.testing.assert_array_equal(again, around[64:128])
    assert (order(1500, 64, 1, seed=4, start_step=start_step) != again).any()


@pytest.mark.parametrize("start_step", [7, 23])
def test_processes_share_a_global_batch(start_step):
    digits = datasets.get_dataset(tiny_config(), "train")
    whole = next(train_batches(digits, 64, 0, start_step))
    parts = [next(train_batches(digits, 64, 0, start_step, p, 4)) for p in range(4)]
    for part in parts:
        np.testing.assert_array_equal(part["image"], whole["image"][part["index"]])
    np.testing.assert_array_equal(np.sort(np.concatenate([p["index"] for p in parts])), range(64))


def write_idx(path, array, opened=open):
    with opened(path, "wb") as file:
        dims = struct.pack(f">{array.ndim}I", *array.shape)
        file.write(bytes([0, 0, 8, array.ndim]) + dims + array.tobytes())


@pytest.mark.parametrize("compressed", [True, False])
def test_idx_files(tmp_path, compressed):
    rng, suffix = np.random.default_rng(0), ".gz" if compressed else ""
    opened = gzip.open if compressed else open
    for prefix, count in (("train", 20), ("t10k", 5)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{suffix}", images, opened)
        labels = rng.integers(0, 10, count).astype(np.uint8)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}", labels, opened)
    config = fashion_mnist_st.get_config()
    config.data.path = str(tmp_path)
    test = datasets.get_dataset(config, "test")
    examples = in_order(test)
    np.testing.assert_array_equal(examples["image"][:, 2:-2, 2:-2, 0], images)
    np.testing.assert_array_equal(examples["label"], labels)
    assert examples["image"][:, :2].max() == 0 and len(test) == 5

    broken = tmp_path / f"train-images-idx3-ubyte{suffix}"
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(UserError, match="is damaged or cut off"):
        datasets.get_dataset(config, "train")
    if compressed:
        raw = bytearray(gzip.compress(bytes(5000)))
        raw[12:30] = bytes([255] * 18)
        broken.write_bytes(raw)
        with pytest.raises(UserError, match="is damaged or cut off"):
            datasets.get_dataset(config, "train")
    broken.unlink()
    with pytest.raises(UserError, match="has no file train-images"):
        datasets.get_dataset(config, "train")


def test_celeba_is_the_centre_140_pixels(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (218, 178, 3), dtype=np.uint8)
    inner = image[39:179, 19:159]
    expected = Image.fromarray(inner).resize((64, 64), Image.Resampling.BILINEAR)
    for i in range(10):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    config = celeba_ddpmpp_nll_st.get_config()
    config.data.path = str(tmp_path)
    found = in_order(datasets.get_dataset(config, "test"))["image"][0]
    np.testing.assert_array_equal(found, np.asarray(expected))
    # Images that are cropped already are taken as they are.
    Image.fromarray(image[:100, :100]).save(tmp_path / "9.png")
    found = in_order(datasets.get_dataset(config, "test"))["image"][0]
    small = Image.fromarray(image[:100, :100]).resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found, np.asarray(small))


def folder_config(path):
    config = tiny_config()
    config.data.update(dataset="folder", path=str(path), num_channels=3)
    return config


def test_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("cats", "dogs"):
        (tmp_path / kind).mkdir()
        for i in range(10):
            size = (11 + i, 24, 3) if i % 2 else (30, 9 + i)
            image = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))
            image.save(tmp_path / kind / f"{i:02}.{'jpg' if i % 3 else 'png'}")
    config = folder_config(tmp_path)
    train, test = (datasets.get_dataset(config, split) for split in ("train", "test"))
    assert (len(train), len(test), train.num_classes) == (18, 2, 2)
    examples = in_order(train)
    assert examples["image"].shape == (18, 8, 8, 3)
    np.testing.assert_array_equal(examples["label"], [0] * 9 + [1] * 9)

    (tmp_path / "cats" / "00.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"no readable images, the first of them .*00\.png"):
        datasets.get_dataset(config, "train")


def test_images_are_read_as_viewers_show_them(tmp_path):
    half = np.zeros((8, 8, 4), np.uint8)
    half[:4, :, 3] = 255  # black above, transparent below
    Image.fromarray(half).save(tmp_path / "0.png")
    Image.fromarray(np.full((8, 8), 51 * 257, np.uint16)).save(tmp_path / "1.png")
    turned = Image.fromarray(np.repeat(np.uint8([[10] * 4 + [200] * 4]), 8, axis=0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    turned.save(tmp_path / "2.png", exif=exif)
    (tmp_path / "._2.png").write_bytes(b"a Mac leaves such files")
    for i in range(3, 10):
        turned.save(tmp_path / f"{i}.png")
    config = folder_config(tmp_path)
    black, grey, turned = in_order(datasets.get_dataset(config, "train"))["image"][:3]
    assert (black[:4] == 0).all() and (black[4:] == 255).all()
    assert (grey == 51).all()
    assert (turned[:4] == 10).all() and (turned[4:] == 200).all()


def test_a_folder_with_its_own_splits_numbers_classes_alike(tmp_path):
    for kind in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / kind).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / kind / f"{i}.png")
    test = in_order(datasets.get_dataset(folder_config(tmp_path), "test"))
    np.testing.assert_array_equal(test["label"], [0, 0, 0, 1, 1, 1])
    # Folders of one split alone are no classes.
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "c")
    assert datasets.get_dataset(folder_config(tmp_path), "test").num_classes == 0


def test_missing_data_say_so(tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        datasets.get_dataset(folder_config(tmp_path / "none"), "train")
    with pytest.raises(UserError, match="has no images"):
        datasets.get_dataset(folder_config(tmp_path), "train")
    config = tiny_config()
    config.data.image_size = 16
    with pytest.raises(UserError, match=r"\(16, 16, 1\); digits has \(8, 8, 1\)"):
        datasets.get_dataset(config, "train")


@pytest.mark.parametrize("dequantization", ["none", "uniform"])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("num_levels", [17, 256])
def test_levels_survive_the_way_to_the_model_and_back(dequantization, centered, num_levels):
    config = tiny_config()
    config.data.update(dequantization=dequantization, centered=centered)
    levels = np.arange(num_levels, dtype=np.uint8).reshape(1, -1, 1, 1).repeat(3, 0)
    keys = jax.random.split(jax.random.key(0), 3)
    preprocessing = pixels.get_preprocessing(data_spec(config), num_levels)
    x = preprocessing.to_x0(levels, keys, flip=False)
    assert x.min() >= (-1 if centered else 0) and x.max() <= 1
    assert x.min() < (-0.8 if centered else 0.1) and x.max() > 0.8
    np.testing.assert_array_equal(preprocessing.to_levels(x), levels)
    if dequantization == "uniform":
        assert (x[0] != x[1]).any()


def test_flip_mirrors_half_of_the_images():
    config = tiny_config()
    config.data.update(random_flip=True, dequantization="none", centered=False)
    image = jnp.tile(jnp.arange(4, dtype=jnp.uint8)[None, None, :, None], (1000, 2, 1, 1))
    keys = jax.random.split(jax.random.key(0), 1000)
    x = np.asarray(pixels.get_preprocessing(data_spec(config), 4).to_x0(image, keys, flip=True)) * 3
    mirrored = (x[:, 0, 0, 0] == 3).mean()
    assert 0.4 < mirrored < 0.6
    np.testing.assert_array_equal(np.sort(x[:, 0, :, 0], axis=1), [[0, 1, 2, 3]] * 1000)


def test_bits_offset_counts_the_levels():
    def bits_offset(num_levels, centered):
        return pixels.Preprocessing(num_levels, centered, "uniform", False).bits_offset

    assert bits_offset(256, centered=True) == 7
    assert bits_offset(256, centered=False) == 8
    # Uniform noise over the whole range costs log2(levels) bits per dimension.
    density_bits = np.log2(2.0)  # -log2 of the uniform density 1/2 on [-1, 1]
    np.testing.assert_allclose(density_bits + bits_offset(17, True), np.log2(17))


def test_a_small_set_of_files_is_read_into_memory(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (150, 8, 8, 3), dtype=np.uint8)
    files = [tmp_path / f"{i:03}.png" for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    source = RecordSource(records_of(Folder(tmp_path), [file.name for file in files]), Fit(8, 3))
    dataset = Dataset("files", source, 256)
    whole = in_memory(dataset, images.nbytes)
    np.testing.assert_array_equal(whole["image"], images)
    assert in_memory(dataset, images.nbytes - 1) is None
    # Their places in it are those of the batches' images, in mid-epoch too.
    for start_step in (0, 5, 9):
        batch = next(train_batches(dataset, 16, 3, start_step))
        places = next(train_batches(dataset, 16, 3, start_step, indices_only=True))
        np.testing.assert_array_equal(images[places["image"]], batch["image"])


def test_files_are_read_ahead_in_order_and_not_far():
    class Slow:
        """Later batches are read faster."""

        def __init__(self):
            self.fetched = []

        def __len__(self):
            return 40

        def fetch(self, indices):
            time.sleep(0.02 / (1 + len(self.fetched)))
            self.fetched.append(indices)
            return {"image": indices, "label": indices}

    source = Slow()
    stream = train_batches(Dataset("slow", source, 256), 4, seed=1)
    found = np.concatenate([next(stream)["image"] for _ in range(20)])
    np.testing.assert_array_equal(found, order(40, 4, 20, seed=1))
    stream.close()
    time.sleep(0.1)
    assert 20 <= len(source.fetched) <= 30


def test_a_file_that_breaks_during_training_is_named(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for file in files:
        Image.new("RGB", (8, 8)).save(file)
    source = RecordSource(records_of(Folder(tmp_path), [file.name for file in files]), Fit(8, 3))
    stream = train_batches(Dataset("files", source, 256), 4, seed=0)
    assert next(stream)["image"].shape == (4, 8, 8, 3)
    files[2].write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"2\.png is not a readable image"):
        for _ in range(100):
            next(stream)


def test_a_flip_and_the_noise_of_its_image_are_independent():
    preprocessing = pixels.Preprocessing(4, False, "uniform", True)
    images = jnp.tile(jnp.array([0, 3], jnp.uint8)[None, None, :, None], (4000, 1, 1, 1))
    keys = jax.random.split(jax.random.key(0), 4000)
    x = 4 * np.asarray(preprocessing.to_x0(images, keys, flip=True)).reshape(4000, 2)
    flipped, noise = x[:, 0] >= 1, x % 1
    for pixel in range(2):
        assert abs(np.corrcoef(flipped, noise[:, pixel])[0, 1]) < 5 / 4000**0.5


@pytest.mark.parametrize("dequantization", ["none", "uniform"])
@pytest.mark.parametrize("centered", [True, False])
def test_levels_without_noise_are_the_middles_of_their_cells(dequantization, centered):
    preprocessing = pixels.Preprocessing(5, centered, dequantization, False)
    levels = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    without = preprocessing.to_x0_without_noise(levels)
    np.testing.assert_allclose(np.diff(without.ravel()), preprocessing.cell_width, rtol=1e-6)
    keys = jax.random.split(jax.random.key(0), 20_000)
    x = preprocessing.to_x0(jnp.asarray(levels[:1].repeat(20_000, axis=0)), keys, flip=False)
    np.testing.assert_allclose(np.mean(x), without[0], atol=3e-3)


def test_values_at_both_ends_are_counted():
    assert pixels.share_at_ends(np.array([0, 0, 1, 15, 16, 16, 16, 9]), 17) == 5 / 8


USE_AS_A_LIBRARY = """
import sys
sys.path[:0] = sys.argv[1:]  # the stand-in's folder, and the repository
import datasets
import jax
from metrics import batched_sampling
import build, likelihood, losses, sampling, session, soft_truncation
from metrics import bits_per_dim, classifier, inception, scorers
from readers import samples
from tests.helpers import random_params, small_networks, tiny_config

config = tiny_config()
config.sampling.update(method="heun", num_steps=1)
with small_networks():
    sample = batched_sampling.get_sampler(build.set_up(config), 2)
    print(datasets.NAME, sample(random_params(config), jax.random.key(0)).levels.shape)
"""


def test_library_use_leaves_the_name_datasets_to_others(tmp_path):
    (tmp_path / "datasets.py").write_text("NAME = 'another library'\n")
    command = [sys.executable, "-c", USE_AS_A_LIBRARY, str(tmp_path), str(ROOT)]
    done = subprocess.run(
        command, env=environment_of(1), capture_output=True, text=True, check=False
    )
    assert done.stdout == "another library (2, 8, 8, 1)\n", done.stderr
