"""Installs what this project needs on Colab, and replaces nothing that is there and new enough."""

import importlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import distributions

PROJECT = pathlib.Path(__file__).parents[1] / "pyproject.toml"


def missing(there: dict[str, str]) -> list[str]:
    """The dependencies in pyproject.toml that are not there, or too old.

    Args:
      there: {package: version} of what is installed, names in lower case with hyphens.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    wanted = map(Requirement, tomllib.loads(PROJECT.read_text())["project"]["dependencies"])
    versions = [(x, there.get(canonicalize_name(x.name))) for x in wanted]
    return [str(x) for x, old in versions if old is None or not x.specifier.contains(old, True)]


def install() -> None:
    """Install the dependencies that are missing, with all others held at their versions.

    Raises:
      SystemExit: a package that is in use was too old and is replaced, so that Python must be
        started again; or pip failed.
    """
    from packaging.utils import canonicalize_name

    there: dict[str, str] = {
        canonicalize_name(x.name): x.version for x in distributions() if x.name
    }
    wanted = missing(there)
    if not wanted:
        return
    names = {canonicalize_name(line.partition(">=")[0]) for line in wanted}
    if shutil.which("nvidia-smi"):
        wanted = [line.replace("jax>=", "jax[cuda12]>=") for line in wanted]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as kept:
        kept.writelines(f"{name}=={old}\n" for name, old in there.items() if name not in names)
        kept.flush()
        command = [sys.executable, "-m", "pip", "install", "-q", *wanted, "-c", kept.name]
        if subprocess.run(command).returncode:
            raise SystemExit("pip could not install the packages; its message is above.")
    importlib.invalidate_caches()
    if replaced := sorted(x for x in names & there.keys() if x.replace("-", "_") in sys.modules):
        raise SystemExit(
            f"Newer versions were installed of {', '.join(replaced)}: Runtime → Restart session, "
            "then run all cells again."
        )
