"""What a run or a report was made with, and the log that is kept of it."""

import contextlib
import datetime
import logging
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version

import jax

from runtime.files import can_do_without

log = logging.getLogger("soft_truncation")


def commit() -> str | None:
    """The commit of this code, with `-dirty` if files were changed; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


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
