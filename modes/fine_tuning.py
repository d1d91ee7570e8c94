"""Fine-tuning: starts a new run from the weights of another run or model."""

import dataclasses
import logging
import pathlib

import jax
import numpy as np
from flax import traverse_util

from build import Setup, set_up
from configs.errors import UserError
from runtime import checkpointing
from runtime.workdir import recorded_config
from train_step import TrainState

log = logging.getLogger("soft_truncation")

_LEAST = 0.1  # of the parameters must fit
_LABELS = "Embed_0/embedding"  # a row for each class, and a last one for no label


def start_from(setup: Setup, state: TrainState, source: str) -> TrainState:
    """The first state of a run, with the weights of another run or of an exported model.

    Every array of the other network's EMA weights is copied if an array here has the same name and
    shape. So the data, the resolution, the objective and the parametrisation may differ. Of the
    labels' embedding, the rows of classes with the same names are copied.

    Args:
      setup: the parts of the new run.
      state: its first state, before weights are copied.
      source: the folder of the other run, whose newest checkpoint is read, or of an exported model.

    Returns:
      `state` with these `params` and `ema_params`; its other arrays are new.

    Raises:
      UserError: `source` can't be read, or has too different a network.
    """
    folder, other = pathlib.Path(source), recorded_config(source)
    if other is None:
        raise UserError(f"--init_from: {folder} is no run and no exported model")
    theirs = set_up(other)
    shape = theirs.state_shape
    there = checkpointing.restore_latest(other, folder, shape, weights_only=True)
    given = traverse_util.flatten_dict(there.ema_params, sep="/")
    own = traverse_util.flatten_dict(jax.tree.map(np.asarray, state.params), sep="/")
    taken = {name: x for name, x in given.items() if np.shape(own.get(name)) == x.shape}
    rows = {}
    if _LABELS in own.keys() & given.keys() and own[_LABELS].shape[1:] == given[_LABELS].shape[1:]:
        rows = _rows_of_classes(setup, theirs)
    if rows:
        taken[_LABELS] = np.array(own[_LABELS])
        taken[_LABELS][list(rows)] = given[_LABELS][list(rows.values())]
    share = sum(x.size for x in taken.values()) / sum(x.size for x in own.values())
    if share < _LEAST:
        raise UserError(
            f"--init_from: {share:.1%} of the parameters here have the name and shape of one in "
            f"{folder}; set config.model as in its config.json"
        )
    log.info("weights of step %d of %s: %s", there.step, folder, _told(own, given, taken, rows))
    params = traverse_util.unflatten_dict(own | taken, sep="/")
    return dataclasses.replace(state, params=params, ema_params=params)


def _rows_of_classes(setup: Setup, other: Setup) -> dict[int, int]:
    """{row of the labels' embedding here: row of the same class, or of no label, in another}."""
    here = setup.classes
    there = other.classes or tuple(map(str, range(other.num_classes)))  # an older run's
    numbers = all(name.isdecimal() for name in (*here, *there))
    datasets = (parts.fields["data"]["dataset"] for parts in (setup, other))
    if numbers and len(set(datasets)) > 1:  # the same numbers of other things
        here = ()
    of_both = {here.index(name): there.index(name) for name in here if name in there}
    return {**of_both, setup.num_classes: other.num_classes}


def _told(
    own: dict[str, np.ndarray],
    given: dict[str, np.ndarray],
    taken: dict[str, np.ndarray],
    rows: dict[int, int],
) -> str:
    """One line that says which arrays were copied and which are new."""

    def some(names: set[str]) -> str:
        shown = sorted(names)
        return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")

    parts = [f"{len(taken)} of {len(own)} arrays"]
    if rows:
        parts.append(f"{len(rows)} of {len(own[_LABELS])} rows of the labels")
    new, unused = own.keys() - taken.keys(), given.keys() - taken.keys()
    parts += [f"new: {some(new)}"] if new else []
    parts += [f"not used: {some(unused)}"] if unused else []
    return "; ".join(parts)
