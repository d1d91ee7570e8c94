"""Checks that imports run in one direction: `python -m tests.check_layers`, part of `make check`.

`lint-imports` reads the layers in pyproject.toml. It knows packages alone, so each module at the
root is shown to it as one: a folder whose __init__.py is a link to the module.
"""

import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]


def main():
    """Exit as lint-imports does; all that it says is shown if it is not content."""
    with tempfile.TemporaryDirectory() as name:
        staged = pathlib.Path(name)
        for module in ROOT.glob("*.py"):
            (staged / module.stem).mkdir()
            (staged / module.stem / "__init__.py").symlink_to(module)
        for package in ROOT.glob("*/__init__.py"):
            (staged / package.parent.name).symlink_to(package.parent)
        command = [pathlib.Path(sys.executable).with_name("lint-imports"), ROOT / "pyproject.toml"]
        done = subprocess.run(command, cwd=staged, capture_output=True, text=True)
    said = done.stdout.strip().splitlines()
    print("\n".join(said[-1:] if done.returncode == 0 else said))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
