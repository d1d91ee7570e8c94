"""pip installs the project as one package, whose modules clash with nothing of others."""

import json
import pathlib
import re
import subprocess
import sys
import sysconfig

import pytest

import build
from configs.saved import as_recorded
from installation.as_package import as_submodule
from runtime import exported
from tests.helpers import environment_of, tiny_config

ROOT = pathlib.Path(__file__).parents[1]

USE = """
import datasets
import models
import numpy as np
import soft_truncation as st
from jax import Array

model: st.Model = st.load("exported")
images: np.ndarray = model.sample(2, seed=0)
bits: dict[str, np.ndarray] = model.bits_per_dim(images)
z: Array = model.encode(images)
again = model.decode(z)
score = model.score(model.to_x(images), 0.5)
denoised: Array = model.denoise(model.to_x(images), sigma=2.0)

assert images.shape == again.shape == score.shape == denoised.shape == (2, 8, 8, 1)
assert np.isfinite(bits["nll"]).all() and np.isfinite(z).all()
assert datasets.theirs and models.theirs
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from models import utils as u", "from soft_truncation.models import utils as u"),
        (
            "from data.pixels import (\n  x,\n)",
            "from soft_truncation.data.pixels import (\n  x,\n)",
        ),
        ("if x:\n    import models", "if x:\n    from soft_truncation import models"),
        ("import models as m  # import", "from soft_truncation import models as m  # import"),
        ("import jax.models", "import jax.models"),
        ("from dataclasses import data", "from dataclasses import data"),
        ("from .data import x", "from .data import x"),
        ("text = 'import models'", "text = 'import models'"),
    ],
)
def test_imports_are_of_the_package(line, expected):
    assert as_submodule(line, {"models", "data"}) == expected


@pytest.mark.parametrize("line", ["import models.utils", "import os, models"])
def test_other_imports_of_own_modules_are_refused(line):
    with pytest.raises(ValueError, match="import one module of the top in a line"):
        as_submodule(line, {"models", "data"})


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment with the wheel, and the other packages of this one."""
    folder = tmp_path_factory.mktemp("installed")
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    (place,) = (folder / "env").glob("lib/*/site-packages")
    (place / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    python, (wheel,) = folder / "env" / "bin" / "python", folder.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    return python


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder with an exported model, and with packages of others of common names."""
    folder, config = tmp_path_factory.mktemp("elsewhere"), tiny_config()
    config.sampling.update(method="dpm_solver", num_steps=2)
    setup = build.set_up(config)
    (folder / "exported").mkdir()
    (folder / "exported" / "config.json").write_text(json.dumps(as_recorded(config)))
    exported.write(folder / "exported", setup.init_state().params, step=0)
    for name in ("datasets", "models"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("theirs = True\n")
    (folder / "use.py").write_text(USE)
    return folder


@pytest.mark.slow
def test_the_installed_object_works_in_another_folder(python, elsewhere):
    sample = ["-m", "soft_truncation.main", "--workdir", "exported", "--mode", "sample"]
    for command in (["use.py"], sample):
        subprocess.run([python, *command], cwd=elsewhere, env=environment_of(1), check=True)
    assert (elsewhere / "exported" / "samples" / "samples.png").is_file()


@pytest.mark.slow
def test_the_installed_object_has_types(python, elsewhere):
    (elsewhere / "wrong.py").write_text(USE + 'model.sample("2")\nst.lod\n')
    command = [sys.executable, "-m", "mypy", "--python-executable", python, "--strict"]
    sound = subprocess.run([*command, "use.py"], cwd=elsewhere, capture_output=True, text=True)
    assert sound.returncode == 0, sound.stdout
    wrong = subprocess.run([*command, "wrong.py"], cwd=elsewhere, capture_output=True, text=True)
    assert len(re.findall(r"wrong\.py:\d+: error", wrong.stdout)) == 2, wrong.stdout
