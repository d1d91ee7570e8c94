"""What a run or a report was made with, and the log that is kept of it."""

import contextlib
import datetime
import logging
import pathlib
import platform
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import metadata, version

import jax

from runtime.files import can_do_without

log = logging.getLogger("soft_truncation")

_PROJECT = pathlib.Path(__file__).parents[1] / "pyproject.toml"  # of a checkout


def project() -> tuple[str, str]:
    """The version of this project, and the address of its repository, "OWNER" if it has none."""
    if _PROJECT.is_file():
        facts = tomllib.loads(_PROJECT.read_text())["project"]
        return facts["version"], facts["urls"]["Repository"]
    installed = metadata("soft-truncation")
    return installed["Version"], installed["Project-URL"].partition(", ")[2]


def commit() -> str | None:
    """The commit of this code, with `-dirty` if files were changed; None outside of git."""
    if not _PROJECT.is_file():  # installed; a repository around it is another's
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        output = subprocess.check_output(command, cwd=_PROJECT.parent, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    return output.decode().strip()


def versions() -> dict[str, str | None]:
    """Versions of the packages that decide a result, of Python, and the commit."""
    packages = ("jax", "jaxlib", "flax", "optax")
    found: dict[str, str | None] = {name: version(name) for name in packages}
    return found | {"python": platform.python_version(), "commit": commit()}


def made_with() -> str:
    """Versions, devices and the date in a line that names no folder of this machine."""
    found = ", ".join(f"{name} {value}" for name, value in versions().items() if value)
    devices = jax.devices()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"{found}; {len(devices)} × {devices[0].device_kind}; {today}"


@contextlib.contextmanager
def logged(path: pathlib.Path) -> Iterator[None]:
    """A context whose log lines are also appended to a file, after what it is made with."""
    handler = None
    with can_do_without(path):
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
        log.info("made with %s; %s", made_with(), shlex.join(sys.argv))
    try:
        yield
    finally:
        if handler:
            log.removeHandler(handler)
            handler.close()
