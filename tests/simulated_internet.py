"""What the authors' addresses answer in the rehearsal: the files of make_datasets' layouts."""

import hashlib
import io
import json
import pathlib

import numpy as np

from readers.published import PUBLISHED
from tests import make_datasets

# Which layout has the files that we download a data set from, and those that TFDS does.
DOWNLOADED = {
    "CIFAR10": "cifar10_python_tar",
    "SVHN": "svhn_mat",
    "STL10": "stl10_tar",
    "fashion_mnist": "fashion_mnist_gz",
}
PREPARED = {
    "cifar10": "cifar10_binary_tar",
    "svhn_cropped": "svhn_mat",
    "stl10": "stl10_tar",
    "fashion_mnist": "fashion_mnist_gz",
    "celeb_a": "celeba_zip",
    "downsampled_imagenet/32x32": "imagenet32_tar",
    "imagenet_resized/32x32": "imagenet32_2017_zip",
}


def celeba_files(made):
    """CelebA's files by their key on Google Drive."""
    from tensorflow_datasets.datasets.celeb_a import celeb_a_dataset_builder as builder

    names = [f"{i:06d}.jpg" for i in range(1, sum(made.counts.values()) + 1)]

    def table(columns):
        lines = [f"{name}{' 1' * len(columns)}" for name in names]
        return "\n".join([str(len(names)), " ".join(columns), *lines, ""]).encode()

    return {
        "0B7EVK8r0v71pZjFTYXZWM3FlRnM": (made.path / "img_align_celeba.zip").read_bytes(),
        "0B7EVK8r0v71pY0NSMzRuSXJEVkk": (made.path / "list_eval_partition.txt").read_bytes(),
        "0B7EVK8r0v71pblRyaVFSWGxPY0U": table(builder.ATTR_HEADINGS),
        "0B7EVK8r0v71pd0FJY3Blby1HUTQ": table(builder.LANDMARK_HEADINGS),
        "1_ee_0u7vcNLOfNLegJRHmolfH5ICW-XS": "".join(f"{name} 1\n" for name in names).encode(),
    }


def imagenet_npz(made, split):
    """A zip of an .npz, as TFDS downloads the set of 2017."""
    arrays, archive = io.BytesIO(), io.BytesIO()
    rows = make_datasets.channels_first(made.images[split])
    np.savez(arrays, data=rows, labels=np.array(made.labels[split]) + 1)
    make_datasets.write_zip(archive, {"data.npz": arrays.getvalue()}, with_folders=False)
    return archive.getvalue()


def answers(made):
    """(the content of each address, {address: (size, SHA-256) of what it leads to}).

    Args:
      made: the layouts of DOWNLOADED and PREPARED, by name.
    """
    files = {}
    for dataset, layout in DOWNLOADED.items():
        folder = made[layout].path
        folder = folder if folder.is_dir() else folder.parent
        for url in PUBLISHED[dataset].downloads:
            files[url] = (folder / url.rsplit("/", 1)[1]).read_bytes()
    cifar10 = made["cifar10_binary_tar"].path
    files["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"] = cifar10.read_bytes()
    extra = made["svhn_mat"].path / "extra_32x32.mat"
    files["http://ufldl.stanford.edu/housenumbers/extra_32x32.mat"] = extra.read_bytes()
    for name in ("train_32x32.tar", "valid_32x32.tar"):
        path = made["imagenet32_tar"].path / name
        files[f"http://image-net.org/small/{name}"] = path.read_bytes()
    for split, name in (("train", "train"), ("test", "val")):
        url = f"http://www.image-net.org/data/downsample//Imagenet32_{name}_npz.zip"
        files[url] = imagenet_npz(made["imagenet32_2017_zip"], split)
    pages = {}
    for key, content in celeba_files(made["celeba_zip"]).items():
        url = f"https://drive.google.com/uc?export=download&id={key}"
        # Drive sends the name in a header; TFDS takes it from the address as well.
        action = f"https://drive.usercontent.google.com/{key}.zip"
        pages[url] = f'<form action="{action}"><input name="id" value="{key}"></form>'.encode()
        files[url] = pages[f"{action}?id={key}"] = content
    sums = {url: (len(data), hashlib.sha256(data).hexdigest()) for url, data in files.items()}
    return {**files, **pages}, sums


def write_shim(folder, sums):
    """Write the folder of PYTHONPATH with checksum_shim."""
    folder.mkdir()
    shim = pathlib.Path(__file__).with_name("checksum_shim.py")
    (folder / "sitecustomize.py").write_text(shim.read_text())
    (folder / "sums.json").write_text(json.dumps(sums))
