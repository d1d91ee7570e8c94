"""Installs the packages that a notebook needs on Colab; it needs no packages itself."""

import importlib
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

REQUIREMENTS = pathlib.Path(__file__).parents[1] / "requirements.txt"


def _imported() -> dict[str, str]:
    """{package: version} of what this process has imported."""
    imported = {name.split(".")[0] for name in sys.modules}
    found: dict[str, str] = {}
    for module, packages in importlib.metadata.packages_distributions().items():
        if module in imported:
            found |= {name: importlib.metadata.version(name) for name in packages}
    return found


def install(packages: Sequence[str]) -> None:
    """Install packages, and those that they need, in the versions of requirements.txt.

    On a machine with an NVIDIA GPU JAX comes with CUDA.

    Args:
      packages: names in requirements.txt.

    Raises:
      SystemExit: a package that this process has imported was replaced, so it must be restarted;
        or pip failed.
    """
    before = _imported()
    pinned: list[str] = []
    for package in packages:
        lines = re.findall(rf"^{re.escape(package)}==.*$", REQUIREMENTS.read_text(), re.MULTILINE)
        if not lines:
            raise SystemExit(f"requirements.txt has no {package}")
        pinned += lines
    if shutil.which("nvidia-smi"):
        pinned = [line.replace("jax==", "jax[cuda12]==") for line in pinned]
    command = [sys.executable, "-m", "pip", "install", "-q", *pinned, "-c", str(REQUIREMENTS)]
    if subprocess.run(command).returncode:
        raise SystemExit("pip could not install the packages; its message is above.")
    importlib.invalidate_caches()
    replaced = [name for name, old in before.items() if importlib.metadata.version(name) != old]
    if replaced:
        raise SystemExit(
            f"Other versions were installed of {', '.join(sorted(replaced))}: Runtime → Restart "
            "session, then run all cells again."
        )
