"""The trained models of the repository fit the code and are small."""

import pathlib

import jax
import numpy as np
import pytest

import build
from configs import saved
from runtime import checkpointing, exported

MODELS = sorted((pathlib.Path(__file__).parents[1] / "pretrained").iterdir())


def test_there_are_two():
    assert [model.name for model in MODELS] == ["fashion_mnist", "photographs"]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_trained_model_is_read_and_is_small(model):
    config = saved.get_config(model)
    setup = build.set_up(config)
    state = checkpointing.restore_latest(config, model, setup.state_shape)
    assert int(state.step) >= 3000
    weights = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.ema_params)])
    assert np.isfinite(weights).all() and weights.std() > 0.01
    files = [path for path in model.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3 * 2**20
    card = (model / "README.md").read_text()
    assert "| `nll`:" in card and "licence of the data" in card and "--mode export" in card
    # Training refuses to write into it.
    with pytest.raises(exported.UserError, match="is an exported model, without the state"):
        exported.refuse(model)
