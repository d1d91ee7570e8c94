"""Builds the wheel: all modules of this folder as submodules of one package, `soft_truncation`.

In a checkout the modules are at the top: `import losses`. Installed, they must not clash with the
`datasets`, `models` or `build` of others, so that `losses` is `soft_truncation.losses` there, and
`soft_truncation.py` is the package's __init__.py. Their imports are changed accordingly.
"""

import ast
import pathlib
import tempfile

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

PACKAGE = "soft_truncation"
ROOT = pathlib.Path(__file__).parent
LEFT_OUT = ("tests", "benchmarks", "experiments", "setup")


def modules() -> list[pathlib.Path]:
    """The Python files that are installed."""
    tops = [path for path in ROOT.glob("*.py") if path.stem not in LEFT_OUT]
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    return tops + [p for d in packages if d.name not in LEFT_OUT for p in d.rglob("*.py")]


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


class _Build(build_py):
    """Copies the modules into the package."""

    def run(self) -> None:
        files = modules()
        own = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in files} - {PACKAGE}
        for path in files:
            name = path.relative_to(ROOT)
            target = pathlib.Path(self.build_lib, PACKAGE, name)
            if path.stem == PACKAGE:
                target = target.with_name("__init__.py")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(as_submodule(path.read_text("utf-8"), own), "utf-8")
        pathlib.Path(self.build_lib, PACKAGE, "py.typed").touch()

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in modules()]


class _Editable(editable_wheel):
    def run(self) -> None:
        raise SystemExit("pip install -e is not supported: put this folder on PYTHONPATH instead")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:  # nothing is left among the modules
        setup(
            packages=[PACKAGE],
            cmdclass={"build_py": _Build, "editable_wheel": _Editable},
            options={"build": {"build_base": folder}},
        )
