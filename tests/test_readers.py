"""Layouts that tests/make_datasets.py writes are read as written; what is broken is refused."""

import gzip
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import datasets
from configs.default import get_default_config
from configs.errors import UserError
from data.batches import in_order
from readers import cache, image_files, lsun
from readers.decode import Fit, open_image
from readers.layout import Records
from readers.published import PUBLISHED
from readers.source import RecordSource
from runtime import environment
from tests import make_datasets
from tests.data_server import DataServer


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return environment.cache_dir()


def write(tmp_path, make):
    folder = tmp_path / "made"
    folder.mkdir()
    return make(folder)


def config_of(made):
    config = get_default_config()
    config.data.update(dataset=made.dataset, path=str(made.path))
    for name, value in made.options.items():
        if name.startswith("data."):
            config.data[name.removeprefix("data.")] = value
    return config


def load(config):
    data = datasets.load_data(config)
    return data, {split: in_order(getattr(data, split)) for split in ("train", "test")}


def expected_images(made, split, config):
    """The images as they are trained on, where the layout says them exactly."""
    images = None if made.images is None else made.images[split]
    if images is None or made.dataset == "STL10":
        return None  # resized
    margin = (config.data.image_size - images.shape[1]) // 2
    return np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", make_datasets.LAYOUTS)
def test_a_layout_is_read_as_written(name, keep, tmp_path):
    made = write(tmp_path, make_datasets.LAYOUTS[name])
    config = config_of(made)
    config.data.cache = keep
    data, examples = load(config)
    for split in ("train", "test"):
        assert len(getattr(data, split)) == made.counts[split]
        assert examples[split]["image"].dtype == np.uint8
        expected = expected_images(made, split, config)
        if expected is not None:
            np.testing.assert_array_equal(examples[split]["image"], expected)
        else:
            means = examples[split]["image"].mean(axis=(1, 2, 3))
            np.testing.assert_allclose(np.sort(means), np.sort(made.means[split]), atol=0.7)
        if made.labels:
            np.testing.assert_array_equal(examples[split]["label"], made.labels[split])
    classes = {"CIFAR10": 10, "SVHN": 10, "IMAGENET32_2017": 1000}.get(made.dataset)
    if not made.labels:
        assert data.train.num_classes == 0
    elif classes:
        assert data.train.num_classes == classes
    else:
        assert data.train.num_classes > max(made.labels["train"])


REFUSED = {
    "cifar10_cut": "cifar-10-python.tar.gz is damaged or cut off",
    "cifar10_corrupt": "cifar-10-python.tar.gz is damaged or cut off",
    "cifar10_code": r"names \w+.system, which is not run",
    "cifar10_missing_batch": "has no file data_batch_3",
    "zip_with_traversal": "points out of the archive; refused",
    "tar_with_link": "a link or a device, 'img.png'",
    "celeba_short_partition": "names 55 images, and .* has 58",
    "celeba_long_partition": "names 60 images, and .* has 58",
    "celeba_bad_partition": "line 6: '000006.jpg training' is not",
    "edm_label_missing": "has no label for .*00000/img",
    "parquet_label_missing": "has no label in row 7",
    "cifar10_other_size": "is 40×40 pixels; this data set's images are 32×32",
    "lsun_no_val": "has no bedroom_val_lmdb",
    "imagenet32_as_2017": "data.dataset=IMAGENET32_2017",
    "imagenet32_2017_as_old": "data.dataset=IMAGENET32$",
    "npz_floats": "images of float32",
    "npz_object": "it has objects",
    "lsun_cut": "data.mdb is shorter than its",
    "lsun_page": "LMDB's library ended at one of its pages",
    "tfrecord_cut": "ends within record",
    "tfrecord_other_shape": "record 11 is 16×16 pixels",
    "png_broken": "1 of 60 files .* the first of them .*023.png",
    "splits_without_test": "a test split beside it",
    "parquet_two_configurations": "has 2 configurations, cropped, full",
    "empty_folder": "has no images",
    "drive_page": "is a web page, not an archive",
}


@pytest.mark.parametrize("name", make_datasets.BROKEN)
def test_what_is_broken_is_refused(name, tmp_path):
    made = write(tmp_path, make_datasets.BROKEN[name])
    with pytest.raises(UserError, match=REFUSED[name]):
        datasets.load_data(config_of(made))
    assert not pathlib.Path(made.options.get("canary", "none")).exists()
    # Nothing is left in the cache that a second start would take for the data.
    with pytest.raises(UserError, match=REFUSED[name]):
        datasets.load_data(config_of(made))


def test_an_lmdb_environment_is_read_on_after_a_signal_to_all_processes(tmp_path):
    write(tmp_path, make_datasets.LAYOUTS["lsun_lmdb"])
    (folder,) = tmp_path.rglob("bedroom_val_lmdb")
    served = lsun._Environment(folder)
    for number in (signal.SIGINT, signal.SIGTERM):
        served._process.send_signal(number)
    assert all(served.get(bytes(key)) for key in served.keys)
    served._other.close()  # as when the program ends
    assert served._process.wait(10) == 0


def test_an_lmdb_environment_leaves_nothing_to_the_interpreters_end(tmp_path):
    write(tmp_path, make_datasets.LAYOUTS["lsun_lmdb"])
    (folder,) = tmp_path.rglob("bedroom_val_lmdb")
    program = (
        "import os, pathlib, signal, sys\n"
        "from readers import lsun\n"
        "environment = lsun._Environment(pathlib.Path(sys.argv[1]))\n"
        "os.kill(environment._process.pid, signal.SIGKILL)\n"
        "environment._process.wait()\n"
    )
    command = [sys.executable, "-X", "dev", "-c", program, str(folder)]
    done = subprocess.run(
        command,
        cwd=pathlib.Path(lsun.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["celeba_zip", "folder_splits", "stl10_tar", "lsun_lmdb"])
def test_the_second_start_decodes_nothing(name, tmp_path, monkeypatch):
    made = write(tmp_path, make_datasets.LAYOUTS[name])
    _, first = load(config_of(made))

    def fail(data):
        raise AssertionError("decoded again")

    monkeypatch.setattr(cache, "open_image", fail)
    data, second = load(config_of(made))
    assert isinstance(data.train.source.images, np.memmap)
    for split in first:
        np.testing.assert_array_equal(first[split]["image"], second[split]["image"])
        np.testing.assert_array_equal(first[split]["label"], second[split]["label"])


def test_the_cache_knows_source_size_and_filter(tmp_path, cache_folder):
    made = write(tmp_path, make_datasets.LAYOUTS["folder_flat"])
    config = config_of(made)
    load(config)
    config.data.image_size = 2 * config.data.image_size
    _, larger = load(config)
    assert larger["train"]["image"].shape[1] == config.data.image_size
    first = next(iter(sorted(made.path.glob("*.png"))))
    image = np.asarray(Image.open(first))
    Image.fromarray(255 - image).save(first)
    _, changed = load(config)
    assert (changed["train"]["image"][0] != larger["train"]["image"][0]).any()
    assert len(list((cache_folder / "data").glob("*/facts.json"))) == 3


def test_a_damaged_or_unfinished_entry_is_made_anew(tmp_path, cache_folder, caplog):
    made = write(tmp_path, make_datasets.LAYOUTS["folder_flat"])
    _, first = load(config_of(made))
    (facts,) = (cache_folder / "data").glob("*/facts.json")
    images = facts.parent / "train.uint8"
    os.truncate(images, images.stat().st_size - 1)
    # As a killed process leaves it.
    shutil.copytree(facts.parent, facts.parent.with_name(f"{facts.parent.name}.partial"))
    _, second = load(config_of(made))
    np.testing.assert_array_equal(first["train"]["image"], second["train"]["image"])
    assert "is damaged (train.uint8 has another size) and is made anew" in caplog.text
    assert not list((cache_folder / "data").glob("*.partial"))
    facts.write_text(json.dumps({"train": {"count": 1}}))
    assert len(load(config_of(made))[0].train) == 54


@pytest.mark.parametrize("problem", ["read-only", "no room"])
def test_without_room_in_the_cache_files_are_read_as_needed(problem, tmp_path, monkeypatch, caplog):
    made = write(tmp_path, make_datasets.LAYOUTS["folder_flat"])
    if problem == "no room":
        usage = shutil.disk_usage("/")._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    data, examples = load(config_of(made))
    np.testing.assert_array_equal(examples["train"]["image"], made.images["train"])
    assert isinstance(data.train.source, RecordSource)
    assert "as they are needed" in caplog.text
    # What is decoded without a check is named when it is reached.
    broken = sorted(made.path.glob("*.png"))[3]
    broken.write_bytes(b"not an image")
    data = datasets.load_data(config_of(made))
    with pytest.raises(UserError, match=f"{broken.name} is not a readable image"):
        in_order(data.train)


def _load(data, both, means):
    config = get_default_config()
    config.data.update(data)
    both.wait(60)
    means.put(float(in_order(datasets.load_data(config).test)["image"].mean()))


def test_two_starts_at_once_decode_once(tmp_path, cache_folder):
    made = write(tmp_path, make_datasets.LAYOUTS["folder_flat"])
    context = multiprocessing.get_context("spawn")
    both, means = context.Barrier(2), context.Queue()
    args = {"dataset": "folder", "path": str(made.path), "image_size": 16}, both, means
    other = context.Process(target=_load, args=args)
    other.start()
    _load(*args)
    found = {means.get(timeout=60) for _ in range(2)}
    other.join()
    assert other.exitcode == 0
    assert len(found) == 1 and abs(found.pop() - made.brightness["test"]) < 1
    assert len(list((cache_folder / "data").glob("*/facts.json"))) == 1


def test_unreadable_images_are_left_out_of_the_cache(tmp_path, caplog):
    made = write(tmp_path, make_datasets.BROKEN["png_broken"])
    for keep in (True, True, False):
        config = config_of(made)
        config.data.update(skip_unreadable=True, cache=keep)
        data = datasets.load_data(config)
        assert len(data.train) + len(data.test) == 59
    assert caplog.text.count("left out") == 2  # the second start has it from the cache


def test_folders_that_count_are_no_classes_and_one_of_a_split_alone_is_none(tmp_path):
    def make(*names):
        folder = tmp_path / "-".join(name.replace("/", "_") for name in names)
        for name in names:
            (folder / name).mkdir(parents=True)
            for i in range(12):
                Image.new("RGB", (8, 8)).save(folder / name / f"{i:02}.png")
        config = get_default_config()
        config.data.update(dataset="folder", path=str(folder), image_size=8)
        return datasets.load_data(config).train.num_classes

    assert make("cat", "dog") == 2
    assert make("0", "1", "2") == 3
    assert make("00000", "01000") == 0
    assert make("cat/a", "dog/b") == 0
    assert make("train/cat", "train/dog", "test/cat", "test/dog") == 2
    assert make("train/cat", "train/dog", "test/cat") == 0


def test_lsun_reads_what_the_category_names(tmp_path):
    made = write(tmp_path, make_datasets.LAYOUTS["lsun_lmdb"])
    config = config_of(made)
    config.data.category = "church_outdoor"
    with pytest.raises(UserError, match="has no church_outdoor_val_lmdb"):
        datasets.load_data(config)
    environment_file = made.path / "bedroom_val_lmdb" / "data.mdb"
    environment_file.write_bytes(b"nothing of the kind" * 1000)
    with pytest.raises(UserError, match="bedroom_val_lmdb is damaged"):
        datasets.load_data(config_of(made))


def test_a_compressed_tar_is_read_in_order(tmp_path, monkeypatch):
    made = write(tmp_path, make_datasets.LAYOUTS["plain_tar"])
    path = made.path.with_name("pets.tar.gz")
    path.write_bytes(gzip.compress(made.path.read_bytes()))
    monkeypatch.setattr("readers.containers._IN_MEMORY", 1000)  # as if it were large
    for keep in (True, False):
        config = config_of(made)
        config.data.update(path=str(path), cache=keep)
        data, examples = load(config)
        assert data.train.source.images.shape[0] == 54
        counts = np.bincount(examples["train"]["label"])
        assert len(counts) == 2 and counts.sum() == 54


def test_records_are_decoded_in_order_and_not_far_ahead(tmp_path):
    asked = []

    def read(i):
        asked.append(i)
        time.sleep(0.002 * (i % 3))
        return np.full((8, 8, 3), i, np.uint8), i

    records = Records(200, read, str)
    decoder = cache._Decoder(Fit(8, 3), skip_unreadable=False)
    blocks = decoder.blocks(records)
    images, labels = next(blocks)
    np.testing.assert_array_equal(labels, np.arange(len(labels)))
    np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(len(labels)))
    assert sorted(asked) == list(range(200))
    stopped = decoder.blocks(Records(10_000, read, str))
    next(stopped)
    stopped.close()
    assert len(asked) < 200 + 2 * 256 + 64


def test_images_of_other_modes_are_read_from_memory():
    assert open_image(np.zeros((4, 4, 1), np.uint8)).mode == "L"
    assert open_image(np.zeros((4, 4, 3), np.uint8)).mode == "RGB"


def test_a_split_needs_a_name_that_is_known(tmp_path):
    for name in ("train", "test", "extra"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    with pytest.raises(UserError, match="beside them extra; move these away"):
        image_files.find_splits(tmp_path)


# Downloads, from a server that stands for the internet.


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """(the address, the file) of a simulated archive, whose checksum is expected."""
    made = write(tmp_path, make_datasets.LAYOUTS["cifar10_python_tar"])
    (url,) = PUBLISHED["CIFAR10"].downloads
    sha256 = hashlib.sha256(made.path.read_bytes()).hexdigest()
    monkeypatch.setitem(PUBLISHED["CIFAR10"].downloads, url, sha256)
    return url, made.path


def through(server, monkeypatch):
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


def test_a_download_is_checked_kept_and_not_asked_for_again(cifar10, monkeypatch, cache_folder):
    url, path = cifar10
    with DataServer({url: path}) as server:
        through(server, monkeypatch)
        for _ in range(2):
            data, examples = load(get_default_config())
            assert len(data.train) == 40 and abs(examples["test"]["image"].mean() - 180) < 1
            asked = server.counts[url]
        assert server.counts[url] == asked
    assert [p.name for p in (cache_folder / "downloads/CIFAR10").glob("*")] == [path.name, ".lock"]


@pytest.mark.parametrize("problem", ["another file", "404", "cut off", "no network"])
def test_a_download_that_fails_says_why_and_what_else_to_do(
    problem, cifar10, monkeypatch, cache_folder
):
    url, path = cifar10
    files = {"another file": b"x" * 1000, "404": 404, "cut off": path}
    with DataServer({url: files.get(problem, path)}, cut=[url] * (problem == "cut off")) as server:
        through(server, monkeypatch)
        if problem == "no network":
            monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
            monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
        start = time.time()
        reason = {
            "another file": "its SHA-256 differs",
            "404": "404 Client Error",
            "cut off": "the download was cut off",
            "no network": "the connection is refused",
        }[problem]
        with pytest.raises(UserError, match=rf"{reason}.*bring cifar-10.*--config.data.path"):
            datasets.load_data(get_default_config())
        assert time.time() - start < 10
    left = [p.name for p in (cache_folder / "downloads/CIFAR10").glob("*")]
    assert left in ([".lock"], [])


def test_a_set_without_an_address_names_its_files():
    config = get_default_config()
    for name, file in (
        ("CELEBA", "img_align_celeba.zip"),
        ("IMAGENET32", "train_32x32.tar"),
        ("LSUN", "SCENE_train_lmdb.zip"),
        ("FFHQ", "ffhq-r08.tfrecords"),
    ):
        config.data.dataset = name
        with pytest.raises(UserError, match=f"no stable address .*{file}.*docs/data.md"):
            datasets.load_data(config)


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_a_folder_of_tfds_is_read_in_either_format(file_format, tmp_path):
    pytest.importorskip("tensorflow")  # it prepares the folder
    import tensorflow_datasets as tfds

    # A data set of that name and TFDS's own code for it: what tfds.load leaves on a disk.
    rng = np.random.default_rng(0)
    splits = {
        name: rng.integers(low, low + 50, (count, 32, 32, 3), dtype=np.uint8)
        for name, low, count in (("train", 30, 21), ("test", 150, 7))
    }

    class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("3.0.2")
        pkg_dir_path = tmp_path

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(32, 32, 3)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(name) for name in splits}

        def _generate_examples(self, name):
            for i, image in enumerate(splits[name]):
                yield i, {"image": image, "label": int(image.sum()) % 10}

    Cifar10(data_dir=tmp_path, file_format=file_format).download_and_prepare()
    config = get_default_config()
    config.data.tfds_dir = str(tmp_path)
    for keep in (True, False):
        config.data.cache = keep
        data, examples = load(config)
        assert data.train.num_classes == 10
        for name, images in splits.items():
            # TFDS shuffles; an image's label follows from its pixels.
            found = examples[name]["image"]
            assert {i.tobytes() for i in found} == {i.tobytes() for i in images}
            assert len(found) == len(images)
            sums = found.astype(int).sum(axis=(1, 2, 3))
            np.testing.assert_array_equal(examples[name]["label"], sums % 10)


def test_images_of_stl10_are_neither_mirrored_nor_turned(tmp_path):
    # At their own size, where every pixel is known.
    made = write(tmp_path, make_datasets.LAYOUTS["stl10_folder"])
    config = config_of(made)
    config.data.image_size = 96
    _, examples = load(config)
    for split in ("train", "test"):
        np.testing.assert_array_equal(examples[split]["image"], made.images[split])
