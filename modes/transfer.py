"""--mode import and --mode export: checkpoints of others, and models to share with others."""

import contextlib
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from clu.parameter_overview import count_parameters

from build import Setup, set_up
from configs import fields
from configs.errors import UserError
from metrics.card import find_grid, model_card
from modes.sample import chosen_step
from official import diffusers, edm, export_checkpoint, import_checkpoint
from runtime import checkpointing, exported, hosts, hub
from runtime.files import beside
from runtime.locking import locked
from runtime.workdir import (
    claim_workdir,
    portable_config,
)
from train_step import (
    TrainState,
)

log = logging.getLogger("soft_truncation")


def import_official(
    setup: Setup,
    workdir: str | os.PathLike[str],
    path: str | pathlib.Path,
    config_file: str = "",
) -> TrainState:
    """Convert a checkpoint of others to a workdir, to evaluate, sample or train further.

    It is an official PyTorch checkpoint, or a network of EDM (`official.edm`), whose file ends in
    .pkl, or a folder of diffusers (`official.diffusers`). The last two have neither raw weights nor
    Adam's moments: training then starts at step 0.

    Returns:
      The state that was saved.

    Raises:
      UserError: the file can't be read or has another network, or the workdir has checkpoints.
    """
    workdir, shape = pathlib.Path(workdir), setup.state_shape.params
    folder = pathlib.Path(path).is_dir()
    if folder or pathlib.Path(path).suffix == ".pkl":
        load_params = diffusers.load_params if folder else edm.load_params
        params = load_params(path, setup.fields, shape)
        state = setup.first_state(jax.tree.map(jnp.asarray, params))
    else:
        fields.call(import_checkpoint.check_network, setup.fields, "model", "optim")
        state = import_checkpoint.load_state(path, shape, setup.optimizer)
    exported.refuse(workdir)
    if any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
        raise UserError(f"{workdir} has checkpoints already; choose another --workdir")
    claim_workdir(setup.fields, workdir, record=True, config_file=config_file)
    with locked(workdir), checkpointing.checkpoints(workdir, setup.loop.snapshot_freq) as manager:
        saver = checkpointing.Saver(manager, max_failures=1)
        saver.save(int(state.step), state)
        saver.settle()
    log.info(
        "imported %s: %s, %s parameters, step %d, into %s",
        path,
        setup.network,
        f"{count_parameters(setup.state_shape.params):,}",
        int(state.step),
        workdir,
    )
    return state


@contextlib.contextmanager
def _exporting(to: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to, which is renamed to `to` at the end, or removed after an error.

    UserError: `to` is a file, or a folder that is not empty, or can't be written to.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to: {to} is there already; name a new one")
    partial = beside(to)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.rename(to)
    except OSError as error:
        raise UserError(f"--to: {to} can't be written to: {error}") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def export(
    setup: Setup, workdir: str | os.PathLike[str], to: str | os.PathLike[str]
) -> pathlib.Path:
    """Write the EMA weights of a checkpoint to a folder that can be shared with others.

    The folder gets model.safetensors, config.json without this machine's paths, README.md, a model
    card with the scores of the run's report, and samples.png, if the run has a grid of this step.
    With --workdir the folder can be evaluated and sampled from like a run.

    Args:
      setup: the parts of the run.
      workdir: the run; the checkpoint is the newest, or the one that eval.begin_ckpt and end_ckpt
        choose.
      to: the folder, which must be new or empty.

    Returns:
      The folder.

    Raises:
      UserError: the checkpoint can't be read, or `to` has files or can't be written to.
    """
    workdir, folder = pathlib.Path(workdir), pathlib.Path(to).absolute()
    step = hosts.on_main(lambda: chosen_step(setup, workdir))
    state = checkpointing.restore_step(setup.fields, workdir, setup.state_shape, step)
    params = state.ema_params

    def write() -> None:
        own = portable_config(setup.fields, workdir)
        with _exporting(folder) as partial:
            partial.mkdir()
            (partial / "config.json").write_text(own.to_json_best_effort(indent=1) + "\n")
            if grid := find_grid(workdir, step):
                shutil.copyfile(grid, partial / exported.PICTURE)
            card = model_card(folder.name, set_up(own), workdir, step, params, bool(grid))
            (partial / "README.md").write_text(card)
            exported.write(partial, params, step)
        size = (folder / exported.WEIGHTS).stat().st_size / 2**20
        log.info("step %d of %s in %s (%.1f MiB), with a card", step, workdir, folder, size)

    hosts.on_main(write)
    return folder


def push(setup: Setup, workdir: str | os.PathLike[str], to: str) -> None:
    """Upload an exported model, or one that is exported of a run now, to the Hugging Face hub.

    Args:
      setup, workdir: as in `export`, or those of an exported model.
      to: hf://user/name; a repository that is not there yet is made.

    Raises:
      UserError: the checkpoint can't be read, or the hub does not take it.
    """
    folder, (name, _) = pathlib.Path(workdir), hub.parts(to)
    hub.client()  # or an error, before a long export
    with tempfile.TemporaryDirectory() as temporary:
        if not exported.is_exported(folder):
            folder = export(setup, workdir, pathlib.Path(temporary) / pathlib.Path(name).name)
        page = hosts.on_main(lambda: hub.push(folder, to))
    log.info("uploaded to %s", page)


def export_official(
    setup: Setup, workdir: str | os.PathLike[str], to: str | os.PathLike[str]
) -> pathlib.Path:
    """Write a checkpoint, with the whole state of training, to a .pth file of the official release.

    Args:
      setup, workdir: as in `export`.
      to: the new file.

    Returns:
      The file.

    Raises:
      UserError: the checkpoint can't be read, the release has no such network, or `to` exists or
        can't be written to.
    """
    workdir, file = pathlib.Path(workdir), pathlib.Path(to).absolute()
    step = hosts.on_main(lambda: chosen_step(setup, workdir))
    exported.refuse(workdir)
    fields.call(import_checkpoint.check_network, setup.fields, "model", "optim")
    shape = setup.state_shape
    state = checkpointing.restore_step(setup.fields, workdir, shape, step, weights_only=False)

    def write() -> None:
        with _exporting(file) as partial:
            given = {"path": partial, "state": state, "model": setup.model}
            given["shape"] = setup.padded_shape
            fields.call(export_checkpoint.write, setup.fields, "optim", "model", **given)
        log.info("step %d of %s in %s, as the official release's", step, workdir, file)

    hosts.on_main(write)
    return file


def export_diffusers(
    setup: Setup, workdir: str | os.PathLike[str], to: str | os.PathLike[str]
) -> pathlib.Path:
    """Write the EMA weights of a checkpoint as a pipeline that diffusers opens.

    Args:
      setup, workdir: as in `export`.
      to: the new folder.

    Returns:
      The folder.

    Raises:
      UserError: the checkpoint can't be read, diffusers has no such network, or `to` exists or
        can't be written to.
    """
    workdir, folder = pathlib.Path(workdir), pathlib.Path(to).absolute()
    step = hosts.on_main(lambda: chosen_step(setup, workdir))
    state = checkpointing.restore_step(setup.fields, workdir, setup.state_shape, step)

    def write() -> None:
        with _exporting(folder) as partial:
            partial.mkdir()
            diffusers.write(partial, setup.fields, state.ema_params)
        log.info("step %d of %s in %s, as a pipeline of diffusers", step, workdir, folder)

    hosts.on_main(write)
    return folder
