import concurrent.futures
import functools
import hashlib
import http.server
import json
import threading
import time

import jax
import numpy as np
import pytest

import datasets
from configs.errors import UserError
from data import pixels
from data.batches import in_order
from metrics import classifier, scorers
from metrics import inception as metrics_inception
from metrics import statistics as stats
from metrics.classifier import get_classifier
from metrics.features import Extractor, apply_batched
from models import inception
from runtime.workdir import PartialResults
from tests import torch_file
from tests.helpers import GOLDEN, inception_state, tiny_config

SIZES = ("cifar", "celeba", "large")  # 32, 64 and 299 pixels


def golden_images(name):
    golden = np.load(GOLDEN / "inception.npz")
    rng = np.random.default_rng(int(golden[f"{name}.seed"]))
    return rng.integers(0, 256, golden[f"{name}.shape"], dtype=np.uint8)


@pytest.fixture(scope="module")
def state():
    return inception_state()


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch_file.save_row(state, path)
    return path


def test_golden_inception(state):
    golden, params = np.load(GOLDEN / "inception.npz"), inception.convert_state(state)
    images = [golden_images(name) for name in SIZES]
    x = np.concatenate([inception.prepare(batch) for batch in images])
    ours = jax.jit(inception.InceptionV3().apply)({"params": params}, x)
    ends = np.cumsum([len(batch) for batch in images])[:-1]
    for name in ("pool_3", "logits_unbiased", "logits"):
        for size, values in zip(SIZES, np.split(ours[name], ends), strict=True):
            theirs = golden[f"{size}.{name}"]
            np.testing.assert_allclose(values, theirs, rtol=1e-3, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.slow
def test_the_extractor_reads_the_file_and_takes_levels_and_grey_images(weights, tmp_path):
    golden = np.load(GOLDEN / "inception.npz")
    extractor = metrics_inception.get_inception(str(weights), tmp_path, 256)
    assert extractor.weights == hashlib.sha256(weights.read_bytes()).hexdigest()
    # Digits have 17 levels and one channel: the same as their grey values in all three.
    digits = in_order(datasets.get_dataset(tiny_config(), "test"), 4)["image"]
    grey = np.repeat(pixels.levels_to_uint8(digits, 17), 3, axis=-1)
    of_levels = metrics_inception.get_inception(str(weights), tmp_path, 17).fn(digits)["features"]
    of_grey = extractor.fn(grey)["features"]
    np.testing.assert_allclose(of_levels, of_grey, rtol=1e-5, atol=1e-6 * of_grey.max())
    pool = golden["cifar.pool_3"]
    ours = extractor.fn(golden_images("cifar"))
    np.testing.assert_allclose(ours["features"], pool, rtol=1e-3, atol=1e-5 * pool.max())
    assert ours["logits"].shape == (4, 1008)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda state: state.pop("fc.weight"), "fc.weight"),
        (lambda state: state.pop("Mixed_7c.branch1x1.bn.bias"), r"Mixed_7c\.branch1x1\.bn\.bias"),
        (lambda state: state.pop("Mixed_7c.branch1x1.conv.weight"), "Mixed_7c_branch1x1"),
        (lambda state: state.update({"fc.bias": np.zeros(1000, np.float32)}), "fc_bias"),
        (lambda state: state.update({"odd.conv.weight": np.zeros(3)}), "odd"),
    ],
)
def test_weights_of_another_network_are_refused(state, change, line):
    state = dict(state)
    change(state)
    with pytest.raises((KeyError, ValueError), match=line):
        inception.convert_state(state)


def test_a_file_of_something_else_is_one_line(tmp_path):
    with pytest.raises(UserError, match="does not hold the weights of FID's Inception: it has no"):
        metrics_inception.get_inception(str(GOLDEN / "vp_ddpmpp.pth"), tmp_path, 256)
    with pytest.raises(UserError, match="No such file"):
        metrics_inception.get_inception(str(tmp_path / "none.pth"), tmp_path, 256)


@pytest.mark.slow
def test_the_resize_is_tensorflow_1s():
    tf = pytest.importorskip("tensorflow")
    for size in (8, 32, 299, 400):
        images = np.random.default_rng(size).integers(0, 256, (1, size, size, 3)).astype(np.float32)
        theirs = tf.compat.v1.image.resize_bilinear(images, (299, 299), align_corners=False)
        np.testing.assert_allclose(inception.resize(images), theirs, atol=2e-4)


@pytest.fixture
def server(tmp_path):
    """(folder that is served, its address)."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_weights_are_downloaded_once_and_checked(server, weights, tmp_path, monkeypatch, caplog):
    folder, address = server
    name, cache = "published.pth", tmp_path / "cache"
    monkeypatch.setattr(metrics_inception, "INCEPTION_URL", f"{address}/{name}")
    # Nothing is there: a line that says what to do, and no file.
    assert metrics_inception.get_inception("", cache, 256) is None
    assert "no FID" in caplog.text and "eval.inception_path" in caplog.text
    # Another file comes: the same.
    (folder / name).write_bytes(weights.read_bytes())
    assert metrics_inception.get_inception("", cache, 256) is None
    assert "not the published file" in caplog.text
    assert list(cache.iterdir()) == []
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setattr(metrics_inception, "INCEPTION_SHA256", digest)
    extractor = functools.partial(Extractor, "inception", fn=None, batch_size=7)
    monkeypatch.setattr(
        metrics_inception, "inception_extractor", lambda _, weights, __: extractor(weights=weights)
    )
    assert metrics_inception.get_inception("", cache, 256).weights == digest
    (folder / name).unlink()
    assert metrics_inception.get_inception("", cache, 256).weights == digest
    # A cached file that is not the published one any more is not trusted.
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (cache / name).write_bytes(damaged)
    with pytest.raises(UserError, match="delete it"):
        metrics_inception.get_inception("", cache, 256)


FACTS = {"extractor": "inception", "weights": "abc", "image_size": 32, "num_images": 50}


@pytest.fixture
def statistics(tmp_path):
    rows = np.random.default_rng(0).standard_normal((50, 2048)).astype(np.float32)
    made = stats.summarize(FACTS, np.split(rows, [7, 30]), 50)
    path = tmp_path / "stats.npz"
    stats.save_statistics(made, path)
    return path, rows, made


def test_statistics_are_kept_with_what_they_are_of(statistics):
    path, rows, made = statistics
    loaded = stats.load_statistics(path, FACTS)
    assert loaded.facts == FACTS
    for name in ("mean", "cov", "features"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(made, name))
    np.testing.assert_allclose(loaded.mean, rows.mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(loaded.features, rows)


@pytest.mark.parametrize(
    ("name", "value"), [("weights", "def"), ("image_size", 64), ("num_images", 49)]
)
def test_statistics_of_something_else_are_refused(statistics, name, value):
    with pytest.raises(UserError, match=f"has {name} {FACTS[name]}, and here it is {value}"):
        stats.load_statistics(statistics[0], FACTS | {name: value})


def test_damaged_statistics_are_refused(statistics, tmp_path):
    path, _, made = statistics
    raw = path.read_bytes()
    for damaged in (raw[: len(raw) // 2], b"", b"PK\x03\x04", raw[:5000] + b"x" + raw[5001:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="can't be read as statistics"):
            stats.load_statistics(path, FACTS)
    with pytest.raises(UserError, match="can't be read as statistics"):
        stats.load_statistics(tmp_path / "none.npz", FACTS)
    for changed, reason in (
        ({"mu": made.mean}, "it has no 'sigma"),
        ({"mu": made.mean[:100], "sigma": made.cov[:100, :100]}, "100 features"),
        ({"mu": made.mean, "sigma": made.cov[:100]}, "do not belong together"),
        ({"mu": made.mean * np.nan, "sigma": made.cov}, "not finite"),
        ({"pool_3": made.mean}, "pool_3 is of shape"),
        ({"mu": np.array([None]), "sigma": made.cov}, "can't be read"),
    ):
        np.savez(path, **changed)
        with pytest.raises(UserError, match=reason):
            stats.load_statistics(path, FACTS)


def test_statistics_of_others_load(statistics, tmp_path, caplog):
    # The official *_stats.npz hold the features, those of pytorch-fid and EDM the moments.
    _, rows, made = statistics
    np.savez(tmp_path / "official.npz", pool_3=rows, logits=rows[:, :1008])
    np.savez(tmp_path / "moments.npz", mu=made.mean, sigma=made.cov)
    official, moments = (
        stats.load_statistics(tmp_path / f"{name}.npz", FACTS) for name in ("official", "moments")
    )
    np.testing.assert_allclose(official.cov, made.cov, atol=1e-6)
    np.testing.assert_array_equal(moments.cov, made.cov)
    assert len(official.features) == 50 and len(moments.features) == 0
    assert caplog.text.count("does not say what it is of") == 2
    assert json.dumps(official.facts) == "{}"


def test_a_subset_of_many_features_is_of_all_parts(monkeypatch):
    monkeypatch.setattr(stats, "SUBSET", 20)
    rows = np.arange(200.0)[:, None].repeat(2, axis=1)
    kept = stats.summarize({}, np.split(rows, 10), 200).features[:, 0]
    assert len(kept) == len(np.unique(kept)) == 20
    assert kept.min() < 50 and kept.max() > 150


def test_batches_of_one_size_cover_everything():
    images = np.arange(7 * 2).reshape(7, 2, 1, 1)
    sizes = []

    def network(batch):
        sizes.append(len(batch))
        return {"features": jax.numpy.asarray(batch.reshape(len(batch), -1))}

    np.testing.assert_array_equal(
        apply_batched(network, images, 3)["features"], images.reshape(7, 2)
    )
    assert sizes == [3, 3, 3]


def test_runs_that_start_at_once_share_a_classifier(tmp_path, monkeypatch):
    train, test = (datasets.get_dataset(tiny_config(), split) for split in ("train", "test"))
    trained, both = [], threading.Barrier(2)

    def train_slowly(model, params, *_):
        trained.append(params)
        time.sleep(0.5)
        return jax.tree.map(lambda x: x + len(trained), params)

    def get(_):
        both.wait()
        return get_classifier(train, test, tmp_path)[0].weights

    monkeypatch.setattr(classifier, "_train_classifier", train_slowly)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(get, range(2))
    assert len(trained) == 1 and first == second


@pytest.mark.slow
def test_classifier_is_trained_once_and_tells_classes_apart(tmp_path, monkeypatch):
    train, test = (datasets.get_dataset(tiny_config(), split) for split in ("train", "test"))
    extractor, accuracy = get_classifier(train, test, tmp_path, steps=200)
    assert accuracy > 0.8
    files = list(tmp_path.glob("*.msgpack"))
    assert len(files) == 1

    def fail(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(classifier, "_train_classifier", fail)
    again, same = get_classifier(train, test, tmp_path, steps=200)
    assert same == accuracy and again.weights == extractor.weights
    images = in_order(test)["image"]
    np.testing.assert_array_equal(extractor.fn(images)["features"], again.fn(images)["features"])
    monkeypatch.undo()

    files[0].write_bytes(files[0].read_bytes()[:100])  # damage: made anew
    mended, _ = get_classifier(train, test, tmp_path, steps=200)
    assert mended.weights == extractor.weights


def scored(tmp_path, name, count, labels=None, shift=0.0):
    """Scores of images under an extractor of their 8 pixels, against these images + `shift`."""
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 1, 1), np.uint8)

    def features(levels):
        rows = levels.reshape(len(levels), 8).astype(np.float32)
        return {"features": rows, "logits": rows[:, :3]}

    reference = stats.summarize({}, [features(images)["features"] + shift], count)
    of = scorers.Images(count, "digest", lambda: iter(np.split(images, 5)), labels)
    extractor = Extractor(name, "abc", features, 100)
    scorer = scorers.Scorer(extractor, reference, {})
    return images, scorers.score_images(scorer, of, PartialResults(tmp_path))


def test_samples_are_scored_by_another_subset_than_the_references(tmp_path, monkeypatch):
    # With the same rows in both, each sample would lie on a training image.
    monkeypatch.setattr(stats, "SUBSET", 40)
    _, report = scored(tmp_path, "inception", 400)
    assert report["num_rows_kid"] == 40
    assert 0.3 < report["precision"] < 1 and 0.3 < report["recall"] < 1


def test_the_error_of_a_scored_distance_is_of_all_samples(tmp_path, monkeypatch):
    whole = scored(tmp_path / "whole", "classifier", 2000, shift=50)[1]["fd_classifier_stderr"]
    monkeypatch.setattr(stats, "SUBSET", 200)
    part = scored(tmp_path / "part", "classifier", 2000, shift=50)[1]["fd_classifier_stderr"]
    assert 0.4 < part / whole < 2.2


def test_agreement_is_scored_over_the_samples_of_a_label(tmp_path):
    labels = np.arange(50) % 4  # 3: drawn for no label
    images, report = scored(tmp_path, "classifier", 50, labels)
    agree = images.reshape(50, 8)[:, :3].argmax(axis=1) == labels
    np.testing.assert_allclose(report["label_agreement"], agree[labels < 3].mean())
