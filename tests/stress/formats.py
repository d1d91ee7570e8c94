"""The formats of files that the program reads: each is written into a folder, and read from it."""

import functools
import json
import os
import shutil

import jax
import numpy as np
from flax import serialization
from PIL import Image

import build
import datasets
from configs import saved
from configs.default import get_default_config
from configs.validate import validate
from data.batches import in_order
from metrics.classifier import _read_classifier
from metrics.statistics import Statistics, load_statistics, save_statistics
from official import edm
from official.pth_reader import read_pth
from official.pth_writer import write_pth
from readers.arrays import whole_stack
from readers.cache import _Decoder, _Entry
from readers.decode import Fit
from readers.layout import Found, Opened, arrays_of
from readers.samples import load_images
from runtime import checkpointing, exported
from runtime.checksums import checksums
from runtime.metrics_log import Metrics
from runtime.pictures import plot_training
from runtime.workdir import PartialResults
from tests import make_datasets
from tests.helpers import GOLDEN


def drawn(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def levels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


PARAMS = {"Conv_0": {"kernel": drawn(3, 3, 8, 64), "bias": drawn(64)}}
STATE = {"params": PARAMS, "ema_params": jax.tree.map(np.square, PARAMS), "step": np.int32(7)}


# What the program keeps for itself.


def write_checkpoint(folder):
    with checkpointing.checkpoints(folder, 1000) as manager:
        saver = checkpointing.Saver(manager, max_failures=1)
        saver.save(7, STATE)
        saver.settle()


def read_checkpoint(folder):
    return checkpointing.restore(folder / "checkpoints", STATE, 7)


def write_config(folder):
    (folder / "config.json").write_text(get_default_config().to_json_best_effort(indent=1))


def read_config(folder):
    validate(saved.get_config(folder), 1, build.REGISTRIES)


def write_model(folder):
    write_config(folder)
    exported.write(folder, PARAMS, 7)


def read_model(folder):
    return exported.read_step(folder), exported.read(folder, PARAMS)


def write_statistics(folder):
    mean, cov, rows = drawn(2048), np.eye(2048), drawn(8, 2048)
    save_statistics(Statistics({"num_images": 8}, 8, mean, cov, rows), folder / "x.npz")


def read_statistics(folder):
    return vars(load_statistics(folder / "x.npz", {"num_images": 8}))


def write_classifier(folder):
    whole = {"params": PARAMS, "checksums": checksums(PARAMS)}
    (folder / "x.msgpack").write_bytes(serialization.msgpack_serialize(whole))


def read_classifier(folder):
    return _read_classifier(folder / "x.msgpack", PARAMS)


def cache_entry(folder):
    """The decoded images of a data set in a cache, the data set, and its decoder."""
    os.environ["XDG_CACHE_HOME"] = str(folder)
    fit, split = Fit(8, 3), arrays_of(levels(90, 8, 8, 3), np.arange(90) % 9)
    opened = Opened(split, split, tuple("abcdefghi"), ("a note",))
    return _Entry("x", Found("x", (), lambda: opened), fit, False), opened, _Decoder(fit, False)


def write_decoded(folder):
    entry, opened, decoder = cache_entry(folder)
    entry.write(opened, decoder)


def read_decoded(folder):
    decoded = cache_entry(folder)[0].read()
    if decoded is None:
        return None
    splits = [source.fetch(np.arange(len(source))) for source in (decoded.train, decoded.test)]
    return splits, json.dumps([decoded.classes, decoded.notes])


def write_results(folder):
    values = {"nll": drawn(500), "json": np.array("a text")}
    PartialResults(folder).get("x", lambda: values)


def read_results(folder):
    return PartialResults(folder).get("x", dict)


# What people bring.


def write_pth_file(folder):
    write_pth(folder / "x.pth", {"model": {"a.weight": drawn(3, 4)}, "step": 3, "ema": [1.0, None]})


def write_edm(folder):
    shutil.copy(GOLDEN / "edm" / "edm_ddpmpp_cond.pkl", folder / "x.pkl")


def read_edm(folder):
    edm.get_config(str(folder / "x.pkl"))
    return edm.read_params(folder / "x.pkl")


def write_arrays(folder, kind):
    images = levels(9, 8, 8, 1)
    if kind == "npy":
        np.save(folder / "x.npy", images)
    else:
        np.savez(folder / "x.npz", samples=images, labels=np.arange(9))


def read_stack(folder, kind):
    whole_stack(folder / f"x.{kind}", "data.path")


def read_samples(folder, name=""):
    source, *_ = load_images(folder / name, 8, 1, "eval.samples")
    source.fetch(np.arange(4))


def write_pngs(folder):
    for i, image in enumerate(levels(6, 8, 8)):
        Image.fromarray(image).save(folder / f"{i}.png")
    pairs = [[f"{i}.png", i % 2] for i in range(6)]
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))


def write_metrics(folder):
    rows = [{"step": i, "loss": 1.0 / i, "tau": 0.1} for i in range(1, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(folder):
    Metrics(folder, 15).close()
    plot_training(folder / "metrics.jsonl", folder / "training.png")


def write_data_set(folder, layout):
    made = make_datasets.LAYOUTS[layout](folder)
    options = {k.removeprefix("data."): v for k, v in made.options.items() if "data." in k}
    told = {"dataset": made.dataset, "path": str(made.path.relative_to(folder)), **options}
    (folder.parent / "told.json").write_text(json.dumps(told))  # which is not to be damaged


def read_data_set(folder):
    config, told = get_default_config(), json.loads((folder.parent / "told.json").read_text())
    path = str(folder / told["path"])
    config.data.update({**told, "path": path, "cache": False})
    in_order(datasets.load_data(config).train)


LAYOUTS = {
    "TFRecord": "celebahq_tfrecords",
    "IDX": "fashion_mnist_raw",
    "IDX gz": "fashion_mnist_gz",
    "CIFAR-10 tar.gz": "cifar10_python_tar",
    "SVHN mat": "svhn_mat",
    "STL-10 tar": "stl10_tar",
    "zip": "plain_zip",
    "tar": "plain_tar",
    "CelebA zip": "celeba_zip",
    "EDM zip": "edm_zip",
    "LSUN lmdb": "lsun_lmdb",
    "Parquet": "parquet_hub",
}

# name: (writes whole files into a folder, reads them)
KEPT = {  # with checksums
    "checkpoint": (write_checkpoint, read_checkpoint),
    "exported model": (write_model, read_model),
    "statistics": (write_statistics, read_statistics),
    "classifier": (write_classifier, read_classifier),
    "decoded images": (write_decoded, read_decoded),
    "partial results": (write_results, read_results),
}
npz, npy = functools.partial(write_arrays, kind="npz"), functools.partial(write_arrays, kind="npy")
BROUGHT = {
    "pth": (write_pth_file, lambda folder: read_pth(folder / "x.pth")),
    "EDM pkl": (write_edm, read_edm),
    "safetensors": KEPT["exported model"],
    "npz": (npz, functools.partial(read_samples, name="x.npz")),
    "npy": (npy, functools.partial(read_stack, kind="npy")),
    "npz stack": (npz, functools.partial(read_stack, kind="npz")),
    "PNG folder": (write_pngs, read_samples),
    "statistics": KEPT["statistics"],
    "config.json": (write_config, read_config),
    "metrics.jsonl": (write_metrics, read_metrics),
} | {
    name: (functools.partial(write_data_set, layout=layout), read_data_set)
    for name, layout in LAYOUTS.items()
}
