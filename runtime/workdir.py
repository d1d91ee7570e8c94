"""A run's workdir: checks and records its config, and stores partial results."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import saved
from configs.default import get_default_config
from configs.errors import UserError
from runtime import hosts
from runtime.files import beside, can_do_without, replacing, write_text

log = logging.getLogger("soft_truncation")

# The paths of a machine.
_PATHS = {
    "data": ("path", "tfds_dir", "cache"),
    "eval": ("cache_dir", "inception_path", "stats_path", "samples", "images"),
}
# Fields that may change when training continues in a workdir: they don't affect the result.
_FREE_TO_TRAIN = {
    "training": (
        # Not snapshot_freq: Orbax would delete the checkpoints kept under another value.
        "n_iters",
        "log_freq",
        "eval_freq",
        "snapshot_sampling",
        "n_jitted_steps",
        "snapshot_freq_for_preemption",
        "max_skipped_steps",
        "max_failed_saves",
    ),
    "data": (*_PATHS["data"], "max_pixels", "skip_unreadable"),
    "model": ("num_scales", "remat", "license"),
    "optim": ("num_micro_batch",),
}
# Fields that must agree with the training when a network is evaluated; all others may change.
_FIXED_TO_EVALUATE = {
    "data": (
        "dataset",
        "category",
        "image_size",
        "image_width",
        "num_channels",
        "num_levels",
        "scale",
        "pad",
        "centered",
    ),
    "training": ("sde", "truncation_time", "unbounded_parametrization", "stabilizing_constant"),
}
_FREE_OF_MODEL = ("license", "num_scales", "remat", "dtype", "dropout", "ema_rate", "init_scale")


def _is_free(section: str, field: str, train: bool) -> bool:
    if section in ("sampling", "eval"):
        return True
    if train:
        return field in _FREE_TO_TRAIN.get(section, ())
    if section == "model":
        return field in _FREE_OF_MODEL
    return field not in _FIXED_TO_EVALUATE.get(section, ())


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any], train: bool) -> str | None:
    """A description of the first field that must not differ but does; None if there is none."""
    defaults = json.loads(get_default_config().to_json_best_effort())
    if train and old.get("seed") != new["seed"]:
        return f"seed is {old.get('seed')} there and {new['seed']} here"
    for section, fields in new.items():
        for field, value in fields.items() if isinstance(fields, dict) else ():
            # A field that is newer than the workdir counts as having its default, if it has one.
            before = old.get(section, {}).get(field, defaults.get(section, {}).get(field))
            if field == "classes" and not before:  # of a run that did not keep their names
                continue
            if before != value and not _is_free(section, field, train):
                return f"{section}.{field} is {before!r} there and {value!r} here"
    return None


def check_processes(fields: Mapping[str, Any], data: dict[str, Any]) -> None:
    """Raise a UserError on every process if their configs, without paths, or their `data` differ.

    Every process must call it.
    """
    facts: dict[str, Any] = {}
    for section, values in fields.items():
        named = values.items() if isinstance(values, dict) else ()
        facts |= {f"{section}.{k}": v for k, v in named if k not in _PATHS.get(section, ())}
        facts |= {} if named else {section: values}
    hosts.check_equal(facts | data)


def record_data(workdir: pathlib.Path, facts: dict[str, Any]) -> None:
    """Record facts about a training's data in data.json; warn if they differ from earlier ones."""
    path, before = workdir / "data.json", facts
    try:
        before = saved.read_object(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("%s is damaged (%s) and is written anew", path, error)
    if before != facts:
        then, now = (" and ".join(map(str, x.values())) for x in (before, facts))
        log.warning(
            "the data have changed since the last training here: %s then, %s now", then, now
        )
    with can_do_without(path):
        write_text(path, json.dumps(facts) + "\n")


def recorded_config(workdir: str | os.PathLike[str]) -> ConfigDict | None:
    """The config of a run or of an exported model; None if there is none.

    All processes must call it; the main process reads the file for them.
    """
    folder = pathlib.Path(workdir)

    def read() -> dict[str, Any] | None:
        return saved.read(folder) if (folder / "config.json").exists() else None

    fields = hosts.on_main(read)
    return None if fields is None else saved.config_of(fields, folder)


def portable_config(fields: Mapping[str, Any], workdir: pathlib.Path) -> ConfigDict:
    """The config of a run, without the paths of this machine.

    Its sections eval and sampling and the licence are those of `fields`; the others are those of
    `workdir`.
    """
    portable = saved.config_of(dict(fields), workdir)
    if (workdir / "config.json").exists():
        own = saved.get_config(workdir)
        for section in ("data", "model", "optim", "training"):
            portable[section] = own[section]
        portable.model.license = fields["model"]["license"]
    # A folder's data need a name, which the report has, though sampling does not read them.
    folder = portable.data.dataset == "folder"
    name = pathlib.Path(portable.data.path).resolve().name if folder else ""
    portable.data.update(path=name, tfds_dir="")
    portable.eval.update(begin_ckpt=0, end_ckpt=0, **dict.fromkeys(_PATHS["eval"], ""))
    if pathlib.Path(portable.sampling.mask).suffix:
        portable.sampling.mask = get_default_config().sampling.mask
    return portable


def make_folder(folder: pathlib.Path, option: str) -> None:
    """Make a writable folder; if that fails, raise a UserError that names the `option`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = beside(folder / "writable")
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise UserError(f"{option}: {folder} can't be written to: {error.strerror}") from error


def check_network(fields: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Check that the workdir's weights were trained with the network and data of this config.

    Raises:
      UserError: it was not.
    """
    if not (workdir / "config.json").exists():
        return
    difference = _first_difference(saved.read(workdir), fields, train=False)
    if difference:
        raise UserError(
            f"{workdir} belongs to another config: {difference}; --workdir without --config takes "
            "the run's own"
        )


def claim_workdir(
    fields: Mapping[str, Any],
    workdir: pathlib.Path,
    record: bool,
    override: bool = False,
    config_file: str = "",
) -> None:
    """Check that the workdir is new or belongs to this config, and record the config there.

    Args:
      fields: the fields of the run's config.
      workdir: the folder.
      record: whether to write the config to the folder's config.json.
      override: whether the workdir may belong to another config.
      config_file: the file that the config comes from. It is recorded too, since the file may
        register a network or data set that the config names.

    Raises:
      UserError: the workdir belongs to another config, lies within another run's workdir, or
        can't be written to.
    """
    path = workdir / "config.json"
    for folder in workdir.resolve().parents:
        if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
            raise UserError(
                f"{workdir} lies within {folder}, the workdir of another run; name another by "
                "--workdir"
            )
    fields = {**fields, "config_file": config_file} if config_file else fields
    if path.exists() and not override:
        difference = _first_difference(saved.read(workdir), fields, train=True)
        if difference:
            raise UserError(
                f"{workdir} belongs to another config: {difference}; choose another --workdir, "
                "delete this one, or go on with it by --override"
            )
    if record:
        make_folder(workdir, "--workdir")
        try:
            write_text(path, json.dumps(fields, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror}") from error


def short_hash(*what: Any) -> str:
    """A hash, 16 hex digits, of trees of arrays and of plain values."""
    whole = hashlib.sha256()
    for item in what:
        for path, leaf in jax.tree_util.tree_leaves_with_path(item):
            whole.update(jax.tree_util.keystr(path).encode())
            array = isinstance(leaf, jax.Array | np.ndarray)
            whole.update(np.asarray(leaf).tobytes() if array else repr(leaf).encode())
    return whole.hexdigest()[:16]


class PartialResults:
    """Stores each result of a long loop in a file, so that an interrupted loop can resume."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Store them in `folder`, which is created when needed."""
        self._folder = folder
        self.used: set[str] = set()  # its subfolders that were used
        self.recalled = False  # whether the last `get` read the result of an earlier run

    def get(self, name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The result of compute(), or the stored one, on every process."""
        path = self._folder / f"{name}.npz"
        self.used.add(name.split("/")[0])
        kept = hosts.share(self._read(path) if hosts.is_main() else None)
        self.recalled = kept is not None
        if self.recalled:
            return kept
        values = compute()
        hosts.on_main(lambda: self._write(path, values))
        return values

    def _read(self, path: pathlib.Path) -> dict[str, np.ndarray] | None:
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        except Exception:  # a damaged archive can raise any kind of error
            log.warning("%s is damaged and is computed again", path)
            return None

    def _write(self, path: pathlib.Path, values: dict[str, np.ndarray]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                np.savez(file, **cast(Any, values))
        except OSError as error:
            raise UserError(
                f"{path} can't be written ({error.strerror}); mend that and run it again: it goes "
                "on from here"
            ) from error

    def discard(self, names: set[str]) -> None:
        """Delete the named subfolders, and keep those of other interrupted work."""
        for name in names:
            shutil.rmtree(self._folder / name, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._folder.rmdir()  # if it is empty


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
