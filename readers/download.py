"""Downloading the files that authors publish at a stable address, once, with a checksum."""

import io
import logging
import pathlib
import threading
from typing import Any, NamedTuple

from configs.default import UserError
from runtime import environment
from runtime.locking import waiting_lock

log = logging.getLogger("soft_truncation")

_SECONDS_TO_ANSWER = 8.0


class Published(NamedTuple):
    """A file on its authors' site."""

    url: str
    sha256: str


_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"

# The files of each data set; the checksums agree with those in TFDS and Keras.
FILES: dict[str, tuple[Published, ...]] = {
    "CIFAR10": (
        Published(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        ),
    ),
    "SVHN": (
        Published(
            "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
            "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        ),
        Published(
            "http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
            "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        ),
    ),
    "STL10": (
        Published(
            "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
            "f31fd99273a1acb8609c8db427cebb1de3f71de77758cdc0e22956e1289b9866",
        ),
    ),
    "fashion_mnist": (
        Published(
            f"{_FASHION}/train-images-idx3-ubyte.gz",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        Published(
            f"{_FASHION}/train-labels-idx1-ubyte.gz",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        Published(
            f"{_FASHION}/t10k-images-idx3-ubyte.gz",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        Published(
            f"{_FASHION}/t10k-labels-idx1-ubyte.gz",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
}


class _LogLines(io.StringIO):
    """Where a progress bar's lines go."""

    def write(self, text: str) -> int:
        """Log a line, if it is one."""
        if text.strip():
            log.info("%s", text.strip())
        return len(text)


def check_reachable(url: str) -> None:
    """Check that a server answers within `_SECONDS_TO_ANSWER`.

    Without this check a download would wait for minutes for an unreachable name server.

    Raises:
      UserError: it does not answer.
    """
    import requests

    problems: list[str] = []

    def ask() -> None:
        try:
            requests.get(url, stream=True, timeout=_SECONDS_TO_ANSWER).close()
            problems.append("")
        except requests.RequestException as error:
            problems.append(_reason(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS_TO_ANSWER)
    problem = problems[0] if problems else f"no answer in {_SECONDS_TO_ANSWER:.0f} s"
    if problem:
        raise UserError(f"{url} can't be reached ({problem})")


def _reason(error: Exception) -> str:
    """A short description of an exception of requests."""
    text = " ".join(str(error).split())
    for sign, words in (
        ("NameResolution", "its name is not found: is there a network?"),
        ("Failed to resolve", "its name is not found: is there a network?"),
        ("timed out", "no answer in time"),
        ("Connection refused", "the connection is refused"),
        ("unreachable", "the network is unreachable"),
        ("IncompleteRead", "the download was cut off"),
        ("CERTIFICATE", "its certificate is not trusted"),
        ("SHA256", "the file is not the published one: its SHA-256 differs"),
        ("No space left", "the disk is full"),
    ):
        if sign in text:
            return words
    text, _, _ = text.partition(" for url: ")  # which the caller names
    return text[:200] or type(error).__name__


def fetch(dataset: str, other_ways: str) -> pathlib.Path:
    """Download a data set's files if they are missing, and return their folder.

    Args:
      dataset: a name in FILES.
      other_ways: a sentence for error messages that says how else to get the data.

    Raises:
      UserError: a file can't be downloaded, or is not the published one.
    """
    folder = environment.cache_dir() / "downloads" / dataset
    missing = [f for f in FILES[dataset] if not (folder / f.url.rsplit("/", 1)[1]).exists()]
    if not missing:
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with waiting_lock(folder / ".lock", f"another process is downloading {dataset}"):
            for file in missing:
                _fetch_file(file, folder)
    except OSError as error:
        raise UserError(
            f"{dataset} can't be downloaded to {folder}: {error.strerror or error}. XDG_CACHE_HOME "
            f"names another folder. {other_ways}"
        ) from error
    except UserError as error:
        raise UserError(f"{dataset} can't be downloaded: {error}. {other_ways}") from error
    return folder


def _fetch_file(file: Published, folder: pathlib.Path) -> None:
    import pooch
    import requests
    import tqdm

    name = file.url.rsplit("/", 1)[1]
    if (folder / name).exists():  # another process has downloaded it
        return
    for partial in folder.glob("tmp*"):  # of an interrupted download
        partial.unlink()
    check_reachable(file.url)
    log.info("downloading %s to %s", file.url, folder)
    pooch.get_logger().setLevel(logging.ERROR)
    unit: dict[str, Any] = {"unit": "B", "unit_scale": True, "mininterval": 3}
    bar = tqdm.tqdm(desc=f"downloading {name}", total=1, file=_LogLines(), **unit)
    downloader: Any = pooch.HTTPDownloader(
        progressbar=bar, chunk_size=2**18, timeout=(_SECONDS_TO_ANSWER, 60)
    )
    try:
        pooch.retrieve(file.url, f"sha256:{file.sha256}", name, folder, downloader=downloader)
    except requests.HTTPError as error:
        raise UserError(f"{file.url}: {_reason(error)}") from error
    except (requests.RequestException, ValueError) as error:
        raise UserError(f"{file.url}: {_reason(error)}") from error
