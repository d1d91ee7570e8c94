"""Only labels that occur are classes, numbered once over both splits, whatever they come from."""

import json
import resource

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import datasets
from configs.default import get_default_config
from data.batches import in_order
from readers import samples
from tests.make_datasets import encoded


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pictures(count=20):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8)


def load(path, dataset="folder"):
    config = get_default_config()
    config.data.update(dataset=dataset, path=str(path), image_size=8, num_channels=1)
    config.data.num_levels = 256 if dataset == "array" else 0
    data = datasets.load_data(config)
    assert data.train.classes == data.test.classes
    labels = [in_order(split)["label"].tolist() for split in data]
    return data.train.classes, *labels


def an_npz(folder, labels):
    np.savez(folder / "a.npz", images=pictures(), labels=labels)
    return folder / "a.npz"


def a_split_npz(folder, labels):
    train, test = np.delete(labels, [9, 19]), labels[[9, 19]]
    x_train, x_test = np.delete(pictures(), [9, 19], axis=0), pictures()[[9, 19]]
    np.savez(folder / "a.npz", x_train=x_train, y_train=train, x_test=x_test, y_test=test)
    return folder / "a.npz"


def a_pair_of_arrays(folder, labels):
    for name, rows in (("train", np.delete(np.arange(20), [9, 19])), ("test", [9, 19])):
        np.save(folder / f"{name}.npy", pictures()[rows])
        np.save(folder / f"{name}_labels.npy", labels[rows])
    return folder


def a_dataset_json(folder, labels):
    pairs = []
    for i, (image, label) in enumerate(zip(pictures(), labels.tolist(), strict=True)):
        Image.fromarray(image[..., 0]).save(folder / f"{i:02}.png")
        pairs.append([f"{i:02}.png", label])
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return folder


def a_parquet_file(folder, labels, names=None):
    images = [{"bytes": encoded(image), "path": None} for image in pictures()]
    table = pyarrow.table({"image": images, "label": labels})
    if names:
        told = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(told)})
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    return folder / "train.parquet"


SOURCES = [
    (an_npz, "folder"),
    (an_npz, "array"),
    (a_split_npz, "folder"),
    (a_split_npz, "array"),
    (a_pair_of_arrays, "array"),
    (a_dataset_json, "folder"),
    (a_parquet_file, "folder"),
]


@pytest.mark.parametrize(("make", "dataset"), SOURCES)
@pytest.mark.parametrize("numbers", [(1, 2, 3), (0, 1, 3), (0, 1, 900_000_000), (0, 1, 2)])
def test_labels_that_occur_are_classes(make, dataset, numbers, tmp_path, caplog):
    caplog.set_level("INFO")
    labels = np.resize(numbers, 20)
    classes, train, test = load(make(tmp_path, labels), dataset)
    assert classes == tuple(map(str, numbers))
    expected = np.resize(range(3), 20)
    assert train == np.delete(expected, [9, 19]).tolist() and test == expected[[9, 19]].tolist()
    line = f"classes: 0 is '{numbers[0]}', 1 is '{numbers[1]}', 2 is '{numbers[2]}'"
    assert (line in caplog.text) == (numbers != (0, 1, 2))


@pytest.mark.parametrize(("make", "dataset"), SOURCES)
def test_labels_that_no_training_image_has_are_not_used_and_a_line_says_so(
    make, dataset, tmp_path, caplog
):
    labels = np.resize([4, 5], 20)
    labels[9] = 7
    path = make(tmp_path, labels)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        classes, train, test = load(path, dataset)
        assert classes == () and not any(train + test)
        assert "labels are not used: no training image has the test images' 7" in caplog.text


def test_labels_of_one_split_alone_are_not_used_and_a_line_says_so(tmp_path, caplog):
    np.savez(tmp_path / "a.npz", x_train=pictures(), y_train=np.arange(20), x_test=pictures())
    for dataset in ("folder", "array"):
        assert load(tmp_path / "a.npz", dataset)[0] == ()
        assert "labels are not used: the test images have none" in caplog.text
        caplog.clear()


def test_one_label_alone_is_no_label(tmp_path):
    assert load(an_npz(tmp_path, np.full(20, 3)))[0] == ()


def test_names_of_the_hub_stay_with_their_labels_and_outlast_the_cache(tmp_path):
    path = a_parquet_file(tmp_path, np.resize([3, 1], 20), ["cat", "dog", "emu", "owl"])
    for _ in range(2):
        classes, train, _ = load(path)
        assert classes == ("dog", "owl") and train[:3] == [1, 0, 1]


def test_folders_of_a_split_without_some_class_have_the_numbers_of_the_training_images(tmp_path):
    for dataset, write in (("folder", save_png), ("array", np.save)):
        for split, names in (("train", "abc"), ("test", "ac")):
            for name in names:
                folder = tmp_path / dataset / split / name
                folder.mkdir(parents=True)
                suffix = "png" if dataset == "folder" else "npy"
                write(folder / f"1.{suffix}", pictures()[0])
        classes, train, test = load(tmp_path / dataset, dataset)
        assert (classes, train, test) == (("a", "b", "c"), [0, 1, 2], [0, 2])


def save_png(path, image):
    Image.fromarray(image[..., 0]).save(path)


def test_a_huge_label_takes_no_memory(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load(a_dataset_json(tmp_path, np.resize([0, 900_000_000], 20)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_images_to_score_come_with_the_names_of_their_classes(tmp_path):
    def labels_of(path):
        return samples.load_images(path, 8, 1, "eval.images").labels

    for make in (an_npz, a_dataset_json):
        folder = tmp_path / make.__name__
        folder.mkdir()
        assert labels_of(make(folder, np.resize([3, 12], 20)))[:3] == ["3", "12", "3"]
    folders = tmp_path / "folders"
    for i, name in enumerate(("cat", "cat", "dog", "owl")):
        (folders / name).mkdir(parents=True, exist_ok=True)
        save_png(folders / name / f"{i}.png", pictures()[i])
    assert labels_of(folders) == ["cat", "cat", "dog", "owl"]
    for path in folders.rglob("*.png"):
        path.rename(folders / path.name)
    assert labels_of(folders) is None
