"""What people bring is read as it is meant, or refused in a line that says what to do."""

import gzip
import io
import json
import os
import re
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, PngImagePlugin

import datasets
from build import with_data_facts
from configs.data import data_spec
from configs.default import get_default_config
from configs.errors import UserError
from configs.vp import array_st
from data import pixels
from data.batches import in_order
from readers import arrays, decode, idx, samples, tfds, tfrecords
from readers.decode import Fit
from runtime import environment
from tests import make_datasets
from tests.make_datasets import encoded


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "brought"
    folder.mkdir()
    return folder


def pictures(count=12, size=8):
    """Images of one colour each: 10, 20, …"""
    levels = 10 * np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(levels, (count, size, size, 3))


def png(number, **options):
    return encoded(np.full((8, 8, 3), 10 * number, np.uint8), **options)


def some_files(folder="", count=12, first=1):
    return {f"{folder}{i:02}.png": png(i) for i in range(first, first + count)}


def load(path, dataset="folder", told=0, **data):
    """(the class names, the sorted levels of the training and the test images)."""
    config = get_default_config()
    config.data.update(dataset=dataset, path=str(path), image_size=8, **data)
    config.model.num_classes = told
    loaded = datasets.load_data(config)
    levels = []
    for split in loaded:
        examples = in_order(split)
        levels.append(sorted(examples["image"][:, 4, 4, 0].tolist()))
    return loaded.train.classes, *levels


def labels(path, **options):
    config = get_default_config()
    config.data.update(dataset="folder", path=str(path), image_size=8, **options)
    return [in_order(split)["label"].tolist() for split in datasets.load_data(config)]


ALL = [10 * i for i in range(1, 13)]
UNSPLIT = (), [level for level in ALL if level != 100], [100]


def array_config(path, **data):
    config = array_st.get_config()
    config.data.update(path=str(path), **data)
    return config


# Names of splits.


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("TRAIN", "Val"),
        ("train_images", "test_images"),
        ("train2017", "val2017"),
        ("my-train", "my.dev"),
        ("Train", "evaluation"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_splits_have_the_usual_names_in_any_case(kind, train, test, place):
    files = {**some_files(f"{train}/"), **some_files(f"{test}/", 2, 20)}
    if kind == "folder":
        make_datasets.write_folder(place, files)
        path = place
    else:
        path = make_datasets.write_zip(place / "a.zip", files)
    assert load(path) == ((), ALL, [200, 210])


def test_classes_that_only_contain_the_name_of_a_split_are_no_splits(place):
    names = ("train station", "test tube", "val d'isère", "car")
    for first, name in enumerate(names):
        make_datasets.write_folder(place, some_files(f"{name}/", 3, 1 + 3 * first))
    assert load(place)[0] == tuple(sorted(names))


def test_what_lies_beside_splits_is_named(place):
    for name in ("train2017", "val2017", "annotations"):
        make_datasets.write_folder(place, some_files(f"{name}/"))
    with pytest.raises(UserError, match="and beside them annotations; move these away"):
        load(place)


def test_zips_of_a_split_each_have_their_labels(place):
    for split in ("train", "test"):
        files = some_files("00000/")
        pairs = [[name, i % 3] for i, name in enumerate(files)]
        files["dataset.json"] = json.dumps({"labels": pairs}).encode()
        make_datasets.write_zip(place / f"{split}.zip", files)
    assert labels(place) == [[0, 1, 2] * 4] * 2


# Archives.


def write_raw_zip(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files:
            info = zipfile.ZipInfo(name)
            info.filename = name  # ZipInfo changes it
            info.compress_type = compression
            archive.writestr(info, data)
    return path


def test_backslashes_divide_the_paths_of_a_zip(place):
    files = {**some_files("train\\a\\", 6), **some_files("train\\b\\", 6, 7)}
    files |= {**some_files("test\\a\\", 1, 20), **some_files("test\\b\\", 1, 21)}
    assert load(write_raw_zip(place / "a.zip", files.items())) == (("a", "b"), ALL, [200, 210])


def test_names_that_begin_with_a_dot_and_a_slash_are_not_hidden(place):
    files = {f"./{name}": data for name, data in some_files().items()}
    assert load(write_raw_zip(place / "a.zip", files.items())) == UNSPLIT


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_files_of_a_name_the_last_one_counts(place):
    files = [*some_files().items(), ("03.png", png(25))]
    expected = sorted({*UNSPLIT[1], 250} - {30})
    assert load(write_raw_zip(place / "a.zip", files))[1] == expected
    with tarfile.open(place / "a.tar", "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert load(place / "a.tar")[1] == expected


def test_a_hard_link_in_a_tar_is_its_file_and_other_links_are_refused(place):
    make_datasets.write_tar(place / "a.tar", some_files(count=11))
    with tarfile.open(place / "a.tar", "a") as tar:
        link = tarfile.TarInfo("12.png")
        link.type, link.linkname = tarfile.LNKTYPE, "./03.png"
        tar.addfile(link)
    assert load(place / "a.tar")[1].count(30) == 2
    with tarfile.open(place / "a.tar", "a") as tar:
        link.linkname, link.name = "/etc/hostname", "13.png"
        tar.addfile(link)
    with pytest.raises(UserError, match=r"has a link or a device, '13\.png'; refused"):
        load(place / "a.tar")


def test_joined_and_sparse_tars_are_never_read_by_half(place):
    for name in "ab":
        make_datasets.write_tar(place / f"{name}.tar", some_files())
    joined = (place / "a.tar").read_bytes() + (place / "b.tar").read_bytes()
    (place / "joined.tar").write_bytes(joined)
    with pytest.raises(UserError, match="goes on behind its end, as archives do that were joined"):
        load(place / "joined.tar")
    with tarfile.open(place / "a.tar", "a") as tar:
        sparse = tarfile.TarInfo("13.png")
        sparse.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(sparse)
    with pytest.raises(UserError, match=r"has a sparse file, '13\.png'; unpack it"):
        load(place / "a.tar")


@pytest.mark.parametrize("kind", ["bz2", "xz", "gz"])
def test_a_packed_tar_has_the_splits_of_the_plain_one(kind, place):
    files = dict(reversed(some_files().items()))
    whole = make_datasets.write_tar(place / "a.tar", files)
    packed = place / f"a.tar.{kind}"
    with tarfile.open(packed, f"w:{kind}") as tar, tarfile.open(whole) as plain:
        for info in plain:
            tar.addfile(info, plain.extractfile(info))
    assert load(packed) == load(whole) == UNSPLIT


def test_encrypted_and_deflate64_zips_are_said_to_be_so(place):
    path = write_raw_zip(place / "a.zip", some_files().items())
    whole = path.read_bytes()
    entry = whole.index(b"PK\x01\x02")  # the first one in the table of contents
    for offset, value, words in ((8, 1, "is encrypted; unpack it"), (10, 9, "packed by deflate64")):
        changed = bytearray(whole)
        changed[entry + offset] = value
        path.write_bytes(changed)
        with pytest.raises(UserError, match=words):
            load(path)


def test_a_damaged_member_is_named_and_left_out_when_asked(place):
    path = write_raw_zip(place / "a.zip", some_files().items())
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"IDAT") + 9] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"1 of 12 files .*a\.zip/01\.png \(Bad CRC-32"):
        load(path)
    assert load(path, skip_unreadable=True)[1] == UNSPLIT[1][1:]


def test_the_first_image_of_a_labelled_zip_may_be_left_out(place):
    files = some_files()
    files["dataset.json"] = json.dumps({"labels": [[n, i % 2] for i, n in enumerate(files)]})
    files["01.png"] = b"no image"
    path = write_raw_zip(place / "a.zip", files.items())
    with pytest.raises(UserError, match=r"01\.png \(it has no image format that is read\)"):
        load(path)
    assert load(path, skip_unreadable=True)[:2] == (("0", "1"), UNSPLIT[1][1:])


def test_a_small_archive_with_a_huge_file_is_refused(place):
    files = [*some_files().items(), ("zeros.bmp", bytes(2**27))]
    path = write_raw_zip(place / "a.zip", files, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"has zeros\.bmp of 134,217,728 bytes, packed into"):
        load(path)
    make_datasets.write_tar(place / "a.tar", dict(files))
    (place / "a.tar.gz").write_bytes(gzip.compress((place / "a.tar").read_bytes(), 1))
    with pytest.raises(UserError, match=r"has zeros\.bmp of 134,217,728 bytes, packed into"):
        load(place / "a.tar.gz")


def test_a_small_gzip_file_of_huge_contents_takes_little_memory(place):
    packed = gzip.compress(b"\0\0\x08\x01" + (2**29).to_bytes(4, "big") + bytes(2**29), 1)
    (place / "train-images-idx3-ubyte.gz").write_bytes(packed)
    del packed
    tracemalloc.start()
    with pytest.raises(UserError, match="is damaged or cut off"):
        idx.read_idx(place / "train-images-idx3-ubyte.gz")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**29


# Folders.


def test_what_is_passed_over_is_counted_and_named(place, caplog):
    make_datasets.write_folder(place, some_files())
    extra = ("IMG.HEIC", "@eaDir/01.png", ".ipynb_checkpoints/02.png", "notes.txt")
    make_datasets.write_folder(place, dict.fromkeys(extra, png(25)))
    (place / "broken.png").symlink_to("nowhere.png")
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        assert load(place) == UNSPLIT
        names = "IMG.HEIC, notes.txt, @eaDir, .ipynb_checkpoints, broken.png"
        told = re.search("5 files or folders of .*brought are passed over: (.*)", caplog.text)
        assert sorted(told[1].split(", ")) == sorted(names.split(", "))


def test_formats_of_images_that_viewers_show_are_read(place):
    kinds = ("tif", "tiff", "gif", "avif", "jfif", "jpe", "jp2", "ppm", "webp", "bmp", "JPG", "png")
    for i, kind in enumerate(kinds):
        image = Image.new("RGB", (8, 8), (40 + i,) * 3)
        options = {"quality": 100} if kind in ("webp", "avif") else {}
        image.save(place / f"{i:02}.{kind}", **options)
    _, train, test = load(place)
    assert np.abs(np.subtract(sorted(train + test), range(40, 52))).max() <= 1


def big_text():
    info = PngImagePlugin.PngInfo()
    info.add_text("notes", "x" * 2**21, zip=True)
    return {"pnginfo": info}


@pytest.mark.parametrize("options", [big_text(), {"icc_profile": bytes(2**21)}])
def test_a_png_with_much_text_or_a_large_profile_is_read(options, place):
    make_datasets.write_folder(place, {**some_files(), "01.png": png(1, **options)})
    assert load(place) == UNSPLIT


def test_an_image_is_turned_although_its_other_exif_tags_are_odd(place):
    half = np.repeat(np.uint8([[[10] * 3] * 8 + [[200] * 3] * 8]), 16, axis=0)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02"
    exif += struct.pack(">HHI", 0x0112, 3, 1) + b"\0\x06\0\0"
    exif += struct.pack(">HHI", 0x011A, 2, 0xFFFFFF) + struct.pack(">I", 0xFFFFFF)  # beyond the end
    files = {f"{i}.jpg": encoded(half, "JPEG", exif=exif, quality=100) for i in range(10)}
    make_datasets.write_folder(place, files)
    config = get_default_config()
    config.data.update(dataset="folder", path=str(place), image_size=16)
    image = in_order(datasets.get_dataset(config, "test"))["image"][0]
    assert (image[:7] < 30).all() and (image[9:] > 180).all()


def saved(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(("dtype", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_images_of_32_bits_are_refused_and_named(dtype, mode, place):
    tiff = saved(Image.fromarray(np.full((8, 8), 1000, dtype)), "TIFF")
    images = [{"bytes": tiff, "path": None}] * 12
    pyarrow.parquet.write_table(pyarrow.table({"image": images}), place / "train.parquet")
    with pytest.raises(UserError, match=rf"train\.parquet, row 0 \(its mode is {mode}, 32 bits"):
        load(place)


def test_16_bits_with_low_values_are_told_and_their_transparency_is_white(place, caplog):
    for i in range(12):
        pixels = np.full((8, 8), 4095 if i else 7, np.uint16)
        image = Image.fromarray(pixels)
        image.save(place / f"{i:02}.png", transparency=7)
    assert load(place)[1] == [15] * 10 + [255]
    assert "the highest value of the images of 16 bits is 4095 of 65535" in caplog.text


def test_images_of_too_many_pixels_are_refused_and_a_field_lifts_the_limit(place):
    files = {f"{i:02}.png": encoded(np.zeros((8, 9, 3), np.uint8)) for i in range(12)}
    make_datasets.write_folder(place, files)
    with pytest.raises(UserError, match=r"it has more pixels than data\.max_pixels=71\)"):
        load(place, max_pixels=71)
    assert len(load(place, max_pixels=72)[1]) == 11
    header = png(1)[:16] + struct.pack(">II", 2**14, 2**14)
    header += png(1)[24:29] + struct.pack(">I", zlib.crc32(header[12:] + png(1)[24:29]))
    (place / "00.png").write_bytes(header + png(1)[33:])
    with pytest.raises(UserError, match=r"00\.png \(it has more pixels than data\.max_pixels"):
        load(place)


def test_names_that_are_not_utf8_are_read(place, caplog):
    make_datasets.write_folder(place, some_files(count=11))
    for name in (b"caf\xe9.png", b"caf\xe9.txt"):
        with open(os.path.join(os.fsencode(place), name), "wb") as file:
            file.write(png(12))
    assert len(load(place)[1]) == 11
    assert r"are passed over: caf\udce9.txt" in caplog.text


def test_sizes_and_labels_are_two_things(place):
    files = {f"{i:02}.png": encoded(np.full((8, 8 + i, 3), 10 + i, np.uint8)) for i in range(12)}
    files["dataset.json"] = json.dumps({"labels": [[n, 1] for n in files][:6]}).encode()
    pairs = [[name, i % 2] for i, name in enumerate(sorted(files)[:12])]
    files["dataset.json"] = json.dumps({"labels": pairs}).encode()
    make_datasets.write_folder(place, files)
    assert load(place)[0] == ("0", "1")
    (place / "dataset.json").write_text('{"labels": null}')
    assert load(place)[0] == ()


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([["01.png", 0.7]], r"dataset\.json can't be understood: the label 0\.7 of 01\.png"),
        ([["01.png", [0, 1]]], r"the label \[0, 1\] of 01\.png is no whole number from 0 on"),
        ([["01.png", -1]], r"the label -1 of 01\.png is no whole number from 0 on"),
        ([["01.png", 10**30]], "is no whole number from 0 on"),
        ([["01.png", 1], ["01.png", 2]], r"it has the labels 1 and 2 for 01\.png"),
    ],
)
def test_labels_that_are_no_whole_numbers_or_contradict_each_other_are_refused(pairs, words, place):
    files = {**some_files(), "dataset.json": json.dumps({"labels": pairs}).encode()}
    make_datasets.write_folder(place, files)
    with pytest.raises(UserError, match=words):
        load(place)


def test_labels_that_are_not_used_have_a_line_that_says_why(place, caplog):
    for name in ("cat", "dog"):
        make_datasets.write_folder(place / "stray" / name, some_files(count=6))
    make_datasets.write_folder(place / "stray", {"03.png": png(3)})
    assert load(place / "stray")[0] == ()
    assert "labels are not used: 03.png is in none of the 2 class folders" in caplog.text
    for split, names in (("train", ("cat", "dog")), ("test", ("cat", "owl"))):
        for name in names:
            make_datasets.write_folder(place / "other" / split / name, some_files(count=6))
    assert load(place / "other")[0] == ()
    assert "labels are not used: no training image has the test images' owl" in caplog.text


def test_more_than_100_folders_are_classes_if_the_network_is_told_labels(place, caplog):
    files = {f"class {i:03}/{j}.png": png(1) for i in range(101) for j in range(2)}
    make_datasets.write_folder(place, files)
    assert load(place)[0] == () and "set --config.model.num_classes=-1" in caplog.text
    assert len(load(place, told=101)[0]) == 101


def test_class_folders_of_two_systems_have_one_name(place):
    for split, name in (("train", "caf\u00e9"), ("test", "cafe\u0301")):
        make_datasets.write_folder(place / split / name, some_files(count=2))
        make_datasets.write_folder(place / split / "bar", some_files(count=2))
    assert load(place)[0] == ("bar", "caf\u00e9")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.npy", "arrays are read by configs/vp/array_st.py"),
        ("shard-000000.tar", "unpack the archives in it, or name one of them"),
        ("images.zip", "unpack the archives in it"),
        ("model.pt", "save its images as files or as an .npy array first"),
        ("data.h5", "save its images as files or as an .npy array first"),
        ("x.zarr/.zarray", "save its images as files or as an .npy array first"),
    ],
)
def test_what_is_no_image_has_a_line_that_says_what_to_do(name, words, place):
    make_datasets.write_folder(place, {name: b"something"})
    with pytest.raises(UserError, match=f"has no images; {words}"):
        load(place)


# Parquet.


def write_parquet(path, count=12, first=1, **columns):
    path.parent.mkdir(exist_ok=True)
    images = [{"bytes": png(i), "path": None} for i in range(first, first + count)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, **columns}), path)


def test_a_missing_shard_is_named(place):
    for i in (0, 2):
        write_parquet(place / "data" / f"train-{i:05}-of-00003.parquet")
    with pytest.raises(UserError, match=r"lacks shard 1 of 3 beside train-00000-of-00003\.parquet"):
        load(place)


def test_a_huge_number_of_shards_takes_no_memory(place):
    write_parquet(place / f"train-0-of-{10**15}.parquet")
    with pytest.raises(UserError, match=f"lacks shard 1 of {10**15}"):
        load(place)


def test_shards_of_two_sets_beside_each_other_are_refused(place):
    for name in ("0-of-2", "1-of-2", "0-of-3", "1-of-3", "2-of-3"):
        write_parquet(place / f"train-{name}.parquet")
    with pytest.raises(UserError, match="which are not the shards of one data set"):
        load(place)


@pytest.mark.parametrize(
    "name",
    [
        "data/train-00000-of-00001-566cc9b19d7203f8.parquet",
        "anything.parquet",
        "train/0000.parquet",
    ],
)
def test_the_hubs_older_names_and_a_single_file_are_read(name, place):
    write_parquet(place / name)
    assert load(place) == UNSPLIT


def test_a_null_row_is_named_and_left_out_when_asked(place):
    write_parquet(place / "train-0-of-2.parquet")
    images = [{"bytes": png(20), "path": None}, None]
    pyarrow.parquet.write_table(pyarrow.table({"image": images}), place / "train-1-of-2.parquet")
    with pytest.raises(UserError, match=r"train-1-of-2\.parquet, row 1 \(it holds no image"):
        load(place)
    assert load(place, skip_unreadable=True)[1] == [*UNSPLIT[1], 200]


def test_an_empty_shard_is_named(place):
    write_parquet(place / "train-0-of-2.parquet")
    (place / "train-1-of-2.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-1-of-2\.parquet is damaged or cut off"):
        load(place)


def test_labels_of_parquet_may_be_text_and_others_are_told(place, caplog):
    write_parquet(place / "train.parquet", target=["owl", "cat"] * 6)
    assert load(place)[0] == ("cat", "owl")
    write_parquet(place / "train.parquet", label=[0.5, 1.5] * 6)
    assert load(place)[0] == ()
    assert "labels are not used: label of" in caplog.text and "is double" in caplog.text


# Arrays.


def save_arrays(folder, count=12, shape=(4, 4)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        np.save(folder / f"{i:02}.npy", np.random.default_rng(i).normal(size=shape))


def test_folders_of_arrays_are_walked_as_folders_of_images_are(place, caplog):
    save_arrays(place / "real")
    (place / "real" / "03.npy").rename(place / "real" / "03.NPY")
    save_arrays(place / ".ipynb_checkpoints", 2)
    save_arrays(place.parent / "elsewhere", 3)
    (place / "linked").symlink_to(place.parent / "elsewhere")
    (place / "real" / "._00.npy").write_bytes(b"a Mac leaves such files")
    config = with_data_facts(array_config(place), "no run")
    data = datasets.load_data(config)
    assert data.train.classes == ("linked", "real") and len(data.train) + len(data.test) == 15
    assert re.search("2 files or folders of .* are passed over", caplog.text)


def test_the_identity_of_a_folder_of_arrays_notices_a_changed_file_of_the_same_size(place):
    save_arrays(place)
    before = arrays.open_stacks(place).train.identity
    file = place / "05.npy"
    status = file.stat()
    np.save(file, np.load(file)[::-1])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))  # an older date
    older = arrays.open_stacks(place).train.identity
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # the same date
    assert len({before, older, arrays.open_stacks(place).train.identity}) == 3


def test_a_relative_path_is_kept_as_an_absolute_one(place, monkeypatch):
    np.save(place / "a.npy", np.random.default_rng(0).normal(size=(20, 8, 8, 1)))
    monkeypatch.chdir(place)
    assert with_data_facts(array_config("a.npy"), "no run").data.path == str(place / "a.npy")


def test_a_shape_that_looks_channels_first_is_told_and_a_field_says_which_it_is(place, caplog):
    caplog.set_level("INFO")
    array = np.random.default_rng(0).normal(size=(20, 4, 8, 9)).astype(np.float16)
    array[:, 2] *= 100
    np.save(place / "a.npy", array)
    with pytest.raises(UserError, match=r"as if channels came first: --config.data.channels_first"):
        with_data_facts(array_config(place / "a.npy"), "no run")
    config = with_data_facts(array_config(place / "a.npy", channels_first=1), "no run")
    train = datasets.load_data(config).train
    back = pixels.get_units(data_spec(config)).to_files(train.source.fetch(np.arange(3))["image"])
    assert np.allclose(back, np.moveaxis(array[:3], 1, 3), atol=1e-2)
    ranges = [f"{a:g} to {b:g}" for a, b in zip(*channel_ends(array), strict=True)]
    assert f"8×9 pixels of 4 channels (the first axis): {', '.join(ranges)}" in caplog.text
    config = with_data_facts(array_config(place / "a.npy", channels_first=0), "no run")
    assert (config.data.image_size, config.data.num_channels) == (4, 9)


def channel_ends(array):
    train = np.delete(array, [9, 19], axis=0)
    return train.min(axis=(0, 2, 3)), train.max(axis=(0, 2, 3))


def test_one_picture_is_not_taken_for_many(place):
    np.save(place / "a.npy", np.zeros((40, 40, 3), np.uint8))
    for dataset in ("folder", "array"):
        with pytest.raises(UserError, match="if it is one picture, bring several"):
            load(place / "a.npy", dataset)


def test_numbers_of_other_byte_orders_are_read_and_of_other_sizes_refused(place):
    values = np.arange(20 * 64, dtype=">u2").reshape(20, 8, 8)
    np.save(place / "a.npy", values)
    config = with_data_facts(array_config(place / "a.npy"), "no run")
    read = datasets.load_data(config).train.source.fetch(np.arange(1))["image"]
    assert read.dtype == np.uint16 and (read[0, ..., 0] == values[0]).all()
    np.save(place / "a.npy", values.astype(np.int32))
    with pytest.raises(UserError, match=r"has examples of int32, .* uint8, uint16 or floats"):
        with_data_facts(array_config(place / "a.npy"), "no run")


def test_labels_beside_the_first_array_are_read(place):
    np.savez(place / "a.npz", pictures(), np.resize([4, 6], 12))
    assert load(place / "a.npz") == (("4", "6"), *UNSPLIT[1:])


def test_a_large_file_of_images_is_not_read_whole(place, monkeypatch):
    np.save(place / "a.npy", pictures())
    monkeypatch.setattr(arrays, "_IN_MEMORY", 3 * 8 * 8 * 3)
    sizes = [len(block) for block, _ in arrays.find(place / "a.npy").open().train.blocks()]
    assert sizes == [3, 3, 3, 2] and load(place / "a.npy") == UNSPLIT


# Files of strangers.


def test_a_record_whose_checksum_is_wrong_is_refused(place):
    made = make_datasets.LAYOUTS["celebahq_tfrecords"](place)
    whole = bytearray(made.path.read_bytes())
    whole[tfrecords.index(made.path)[4][0] + 100] ^= 1
    made.path.write_bytes(whole)
    with pytest.raises(UserError, match=r"1 of \d+ files .*, record \d+ \(its checksum is wrong\)"):
        load(made.path, "CelebAHQ")


def test_the_checksum_is_crc_32c():
    for length in (4, 5, 7, 8, 1000, 4099):
        data = np.random.default_rng(length).bytes(length)
        crc = make_datasets.crc32c(data)
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
        assert tfrecords.masked_crc32c(data) == masked


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
def test_features_of_tfds_name_its_own_classes_alone(key, place, monkeypatch):
    folder = place / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    image = {key: "strange.module.Feature"}
    told = {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict"}
    features = told | {"featuresDict": {"features": [{"image": image}]}}
    monkeypatch.setattr(tfds, "_import", lambda: pytest.fail("TFDS is asked"))
    twice = json.dumps(image)[:-1] + f', "{key}": ""}}'  # of a doubled key parsers take either
    for text in (json.dumps(features), twice):
        (folder / "features.json").write_text(text)
        with pytest.raises(UserError, match=r"names strange\.module\.Feature, which is not TFDS"):
            tfds.find("cifar10", place, ("train", "test"), 10).open()


def an_array(shape=(1, 3072), data=bytes(3072), dtype="u1"):
    """A pickled array as NumPy writes it, with any shape, bytes and type."""

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value

    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
    sizes = b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in shape) + b"t"
    kind = (
        b"cnumpy\ndtype\n" + text(dtype.encode()) + b"K\0K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
    )
    kind += b"J\xff\xff\xff\xffK\0tb"
    return made + b"(K\x01" + sizes + kind + b"\x89B" + struct.pack("<I", len(data)) + data + b"tb"


def write_batch(root, data, of_labels=b"](K\x03e"):
    made = make_datasets.LAYOUTS["cifar10_python_batches"](root)
    batch = b"\x80\x02}(U\x04data" + data + b"U\x06labels" + of_labels + b"u."
    (made.path / "data_batch_2").write_bytes(batch)
    return made.path


def test_a_pickled_array_is_made_of_its_bytes(place):
    path = write_batch(place, an_array(data=bytes(range(256)) * 12))
    config = get_default_config()
    config.data.update(dataset="CIFAR10", path=str(path))
    assert len(datasets.load_data(config).train) > 0


@pytest.mark.parametrize(
    ("data", "of_labels", "words"),
    [
        (an_array((2_000_000, 3072)), b"](K\x03e", r"an array of shape \(2000000, 3072\) in 3072"),
        (an_array((-1, 3072)), b"](K\x03e", "an array of shape"),
        (an_array(dtype="O"), b"](K\x03e", "an array that is not of numbers"),
        # ndarray((1,), 'O', b'A' * 8), whose pointers are the file's
        (an_array(), b"cnumpy\nndarray\n(K\x01\x85U\x01OU\x08AAAAAAAAtR", "no whole numbers"),
        # ndarray((2_000_000, 3072), 'u1'), memory of any size
        (b"cnumpy\nndarray\n(J\x80\x84\x1e\0M\0\x0c\x86U\x02u1tR", b"](K\x03e", "rows of 3072"),
        (b"cnumpy\nndarray\n}U\x01aK\x01sb", b"](K\x03e", "sets attributes of what has none"),
        (b"\x96" + struct.pack("<Q", 2**40), b"](K\x03e", "opcode BYTEARRAY8"),
    ],
)
def test_a_pickle_calls_no_constructor_of_numpy(data, of_labels, words, place):
    with pytest.raises(UserError, match=words):
        load(write_batch(place, data, of_labels), "CIFAR10")


def test_large_images_are_converted_one_at_a_time(place, monkeypatch):
    make_datasets.write_folder(place, some_files())
    monkeypatch.setattr(decode, "_LARGE", 60)
    at_once, most = [], []

    def fitted(self, image):
        at_once.append(image)
        most.append(len(at_once))
        time.sleep(0.01)
        at_once.pop()
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(Fit, "_fitted", fitted)
    load(place)
    assert len(most) == 12 and max(most) == 1


def test_names_and_images_of_a_packed_tar_to_score_belong_together(place):
    files = dict(reversed(some_files().items()))
    with tarfile.open(place / "a.tar.bz2", "w:bz2") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source, names, _ = samples.load_images(place / "a.tar.bz2", 8, 3, "eval.images")
    levels = source.fetch(np.arange(12))["image"][:, 0, 0, 0]
    assert [f"{level // 10:02}.png" for level in levels] == names


def test_a_network_that_is_told_labels_reads_the_same_decoded_images(place):
    for name in ("cat", "dog"):
        make_datasets.write_folder(place / name, some_files(count=6))
    load(place)
    load(place, told=2)
    assert len(list((environment.cache_dir() / "data").glob("*/facts.json"))) == 1


@pytest.mark.parametrize("name", ["photos-2023.parquet", "train2017.parquet"])
def test_a_number_in_a_parquet_files_name_is_no_shards(name, place):
    write_parquet(place / name)
    assert load(place) == UNSPLIT


def test_a_test_split_alone_is_not_trained_on(place):
    write_parquet(place / "test-0-of-1.parquet")
    with pytest.raises(UserError, match="has parquet files, and none is called train"):
        load(place)
