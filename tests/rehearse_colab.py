"""Runs the notebooks as on Colab, and the fast tests with the lowest versions of the dependencies.

    python -m tests.rehearse_colab FOLDER [--python python3.13] [--only notebooks]

In FOLDER, which is new, it makes an environment with the packages that Colab has. Each notebook
then runs in an empty folder: its first cell clones the last commit of this checkout, and installs
what is missing. At last the lowest versions that pyproject.toml names are installed, and the fast
tests run. It takes an hour on two cores, needs the internet for pip, and is meant for releases.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import time
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
# What Colab has of the packages that matter here, in its versions (December 2026).
COLAB = {
    "jax": "0.7.2",
    "flax": "0.11.2",
    "orbax-checkpoint": "0.12.4",
    "numpy": "2.1.3",
    "protobuf": "5.29.6",
}
# It has these too; the lowest versions of them are taken.
ALSO = {"absl-py", "filelock", "matplotlib", "optax", "pillow", "pooch", "requests"}
ALSO |= {"safetensors", "scikit-learn", "scipy", "tqdm", "xxhash"}
NOTEBOOK = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], as_version=4)
cell = notebook.cells[1]
address = cell.source.split('"')[1]
cell.source = cell.source.replace(address, sys.argv[2])
nbclient.NotebookClient(notebook, timeout=1800).execute()
"""


def installed(python):
    """{package: version} in the environment of a Python."""
    frozen = subprocess.check_output([python, "-m", "pip", "freeze"], text=True)
    return dict(line.split("==") for line in frozen.splitlines() if "==" in line)


def lowest():
    """{package: lowest version} of the dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["data"]
    return dict(line.split(">=") for line in lines)


def pip_install(python, versions, *others):
    pins = [f"{name}=={version}" for name, version in versions.items()]
    subprocess.run([python, "-m", "pip", "install", "-q", *pins, *others], check=True)


def make_environment(folder, python):
    """An environment with Colab's packages, where `google.colab` is imported at the start."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    versions = {name: version for name, version in lowest().items() if name in ALSO}
    pip_install(python, versions | COLAB, "ipykernel", "nbclient", "packaging", "setuptools")
    (place,) = folder.glob("lib/*/site-packages")
    (place / "google" / "colab").mkdir(parents=True)
    (place / "google" / "colab" / "__init__.py").write_text("output = None\n")  # JAX imports it
    (place / "colab.pth").write_text("import google.colab\n")
    return python


def run_notebooks(python, folder):
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        place, before, start = folder / path.stem, installed(python), time.monotonic()
        place.mkdir()
        shutil.copy(path, place)
        command = [python, "-c", NOTEBOOK, path.name, ROOT.as_uri()]
        subprocess.run(command, cwd=place, check=True)
        after = installed(python)
        kept = all(after[name] == version for name, version in before.items())
        new = " ".join(f"{name}=={after[name]}" for name in sorted(after.keys() - before.keys()))
        took = time.monotonic() - start
        print(f"{path.name}: {took:.0f} s, installed: {new or 'nothing'}", flush=True)
        assert kept, f"of {before} some were replaced: {after}"


def run_tests(python, checkout):
    """Run the fast tests of a clone with the lowest versions."""
    pip_install(python, lowest() | COLAB, "pytest", "pytest-xdist")
    command = [python, "-m", "pytest", "-m", "not slow and not release", "-n", "1"]
    return subprocess.run(command, cwd=checkout).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--python", default="python3.13")
    parser.add_argument("--only", choices=["notebooks", "tests"])
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    folder = options.folder.resolve()
    python = make_environment(folder / "environment", options.python)
    if options.only != "tests":
        run_notebooks(python, folder)
    if options.only != "notebooks":
        checkout = folder / "checkout"
        clone = ["git", "clone", "-q", "--depth=1", ROOT.as_uri(), checkout]
        subprocess.run(clone, check=True)
        sys.exit(run_tests(python, checkout))


if __name__ == "__main__":
    main()
