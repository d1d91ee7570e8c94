"""Downloading the files that authors publish at a stable address, once, with a checksum."""

import io
import logging
import pathlib
import posixpath
import threading
from collections.abc import Mapping
from typing import Any

from configs.errors import UserError
from runtime import environment
from runtime.locking import waiting_lock

log = logging.getLogger("soft_truncation")

_SECONDS_TO_ANSWER = 8.0


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

    problem = f"no answer in {_SECONDS_TO_ANSWER:.0f} s"

    def ask() -> None:
        nonlocal problem
        try:
            requests.get(url, stream=True, timeout=_SECONDS_TO_ANSWER).close()
            problem = ""
        except requests.RequestException as error:
            problem = _reason(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS_TO_ANSWER)
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


def fetch(dataset: str, files: Mapping[str, str], other_ways: str) -> pathlib.Path:
    """Download a data set's files if they are missing, and return their folder.

    Args:
      dataset: its name.
      files: the SHA-256 of each, by its address.
      other_ways: the end of error messages, which says how else to get the data.

    Raises:
      UserError: a file can't be downloaded, or is not the published one.
    """
    folder = environment.cache_dir() / "downloads" / dataset
    missing = [url for url in files if not (folder / posixpath.basename(url)).exists()]
    if not missing:
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with waiting_lock(folder / ".lock", f"another process is downloading {dataset}"):
            for url in missing:
                _fetch_file(url, files[url], folder)
    except OSError as error:
        raise UserError(
            f"{dataset} can't be downloaded to {folder}: {error.strerror or error}. XDG_CACHE_HOME "
            f"names another folder; {other_ways}"
        ) from error
    except UserError as error:
        raise UserError(f"{dataset} can't be downloaded: {error}; {other_ways}") from error
    return folder


def _fetch_file(url: str, sha256: str, folder: pathlib.Path) -> None:
    import pooch
    import requests
    import tqdm

    name = posixpath.basename(url)
    if (folder / name).exists():  # another process has downloaded it
        return
    for partial in folder.glob("tmp*"):  # of an interrupted download
        partial.unlink()
    check_reachable(url)
    log.info("downloading %s to %s", url, folder)
    pooch.get_logger().setLevel(logging.ERROR)
    unit: dict[str, Any] = {"unit": "B", "unit_scale": True, "mininterval": 3}
    bar = tqdm.tqdm(desc=f"downloading {name}", total=1, file=_LogLines(), **unit)
    downloader: Any = pooch.HTTPDownloader(
        progressbar=bar, chunk_size=2**18, timeout=(_SECONDS_TO_ANSWER, 60)
    )
    try:
        pooch.retrieve(url, f"sha256:{sha256}", name, folder, downloader=downloader)
    except (requests.RequestException, ValueError) as error:
        raise UserError(f"{url}: {_reason(error)}") from error
