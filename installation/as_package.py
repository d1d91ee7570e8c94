"""Builds the wheel: all modules of this repository as submodules of one package, `soft_truncation`.

In a checkout the modules are at the top: `import losses`. Installed, they must not clash with the
`datasets`, `models` or `build` of others, so that `losses` is `soft_truncation.losses` there, and
`soft_truncation.py` is the package's __init__.py. Their imports are changed accordingly. pip calls
`build_wheel` (PEP 517), as pyproject.toml says.
"""

import ast
import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from setuptools import build_meta

PACKAGE = "soft_truncation"
ROOT = pathlib.Path(__file__).parents[1]
LEFT_OUT = ("tests", "benchmarks", "experiments")


def modules() -> list[pathlib.Path]:
    """The Python files that are installed."""
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    inner = [p for d in packages if d.name not in LEFT_OUT for p in d.rglob("*.py")]
    return [*ROOT.glob("*.py"), *inner]


def _top(name: str | None) -> str:
    return (name or "").split(".")[0]


def as_submodule(text: str, own: set[str]) -> str:
    """The text of a module, which imports the modules `own` from the package instead.

    Raises:
      ValueError: an import has a form that this function does not know.
    """
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        line = lines[node.lineno - 1] if isinstance(node, ast.Import | ast.ImportFrom) else ""
        if isinstance(node, ast.ImportFrom) and not node.level and _top(node.module) in own:
            old, new = "from ", f"from {PACKAGE}."
        elif isinstance(node, ast.Import) and own & {_top(x.name) for x in node.names}:
            if len(node.names) > 1 or "." in node.names[0].name:
                raise ValueError(f"import one module of the top in a line, not {line!r}")
            old, new = "import ", f"from {PACKAGE} import "
        else:
            continue
        start = node.col_offset  # only spaces are before it
        lines[node.lineno - 1] = line[:start] + line[start:].replace(old, new, 1)
    return "".join(lines)


@contextlib.contextmanager
def _in_copy() -> Iterator[None]:
    """The package in a folder of its own, which is the working directory meanwhile."""
    files = modules()
    own = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in files} - {PACKAGE}
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, file)
        for path in files:
            target = pathlib.Path(PACKAGE, path.relative_to(ROOT))
            if path.stem == PACKAGE:
                target = target.with_name("__init__.py")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(as_submodule(path.read_text("utf-8"), own), "utf-8")
        pathlib.Path(PACKAGE, "py.typed").touch()
        yield


def build_wheel(wheel_directory: str, config_settings: Any = None, _: str | None = None) -> str:
    """Build the wheel in a folder, and return its name."""
    to = os.path.abspath(wheel_directory)
    with _in_copy():
        return str(build_meta.build_wheel(to, config_settings))
