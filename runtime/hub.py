"""Exported models on the Hugging Face hub, as `hf://user/name`, by the package huggingface_hub.

The environment variable HF_ENDPOINT names another hub; `hf auth login` keeps a token. Only the
files of an exported model are read, and they are checked as those of any folder.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from configs.errors import UserError
from runtime.exported import PICTURE, WEIGHTS
from runtime.workdir import first_line

SCHEME = "hf://"


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address of the hub."""
    return str(path).startswith(SCHEME)


def parts(address: str) -> tuple[str, str | None]:
    """(user/name, revision or None) of an address; UserError if it is none."""
    found = re.fullmatch(rf"{SCHEME}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address, re.ASCII)
    if not found:
        raise UserError(f"{address} is no address of the hub; they are hf://user/name[@revision]")
    return found[1], found[2]


def client() -> Any:
    """The package huggingface_hub; UserError if it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{SCHEME} needs another package: pip install huggingface_hub") from error
    return huggingface_hub


@contextlib.contextmanager
def _in_a_line(address: str) -> Iterator[None]:
    """Raise the client's errors, which are of many kinds, as a UserError."""
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        yield
    except RepositoryNotFoundError as error:
        reason = "there is no such model, or it is not yours to see; hf auth login logs you in"
        raise UserError(f"{address}: {reason}") from error
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        reason = first_line(error)
        if status in (401, 403):
            reason = "the hub does not let you; hf auth login with a token that may write"
        elif isinstance(error, EntryNotFoundError) and status == 404:
            reason = f"it is no model of this project, which has config.json and {WEIGHTS}"
        raise UserError(f"{address}: {reason}") from error


def fetch(address: str) -> pathlib.Path:
    """Download a model, or find it in the hub's cache, and return its folder.

    Raises:
      UserError: it can't be downloaded, or it is no exported model.
    """
    name, revision = parts(address)
    hub = client()
    with _in_a_line(address):
        config = pathlib.Path(hub.hf_hub_download(name, "config.json", revision=revision))
        hub.hf_hub_download(name, WEIGHTS, revision=config.parent.name)  # of the same commit
    return config.parent


def push(folder: pathlib.Path, address: str) -> str:
    """Upload an exported model, and return the address of its page.

    A repository that is not there yet is made, as visible as the user's settings say.

    Raises:
      UserError: it can't be uploaded.
    """
    name, revision = parts(address)
    api = client().HfApi()
    files = ["config.json", "README.md", WEIGHTS, PICTURE]
    with _in_a_line(address):
        page = api.create_repo(name, exist_ok=True)
        message = "Upload a model of soft truncation"
        options = {"allow_patterns": files, "revision": revision, "commit_message": message}
        api.upload_folder(repo_id=name, folder_path=folder, **options)
    return str(page)
