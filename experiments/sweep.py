"""Sweeps: a recipe, points that override fields of it, seeds, and how each run is evaluated.

A Python file defines a sweep in a function `get_sweep()`. A run is a point with a seed.
"""

import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import re
import sys
from typing import Any

from ml_collections import ConfigDict

from configs.default import get_default_config
from configs.errors import UserError

# Paths of data and caches on a machine. They do not affect scores and are not part of a run's hash.
MACHINE_PATHS = ("data.path", "data.tfds_dir", "eval.cache_dir")
_FOLDERS = ("data.path", "eval.images")  # the fields that may name a folder in {data}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation of a trained run.

    Attributes:
      overrides: {dotted field: value}, as for `--mode eval`.
      prefix: what the names of its scores begin with in the row, such as "validation_".
      scores: the scores that go into the row; empty: the whole report.
    """

    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    scores: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A grid of runs.

    Attributes:
      name: the name of the sweep, which is in every row.
      config: the base config; its seed is not used. In `data.path` and `eval.images`, here and in
        all overrides, "{data}" is the folder that `--set data.path=DIR` names.
      points: {name of a point: {dotted field: value}}.
      seeds: the seeds that each point is run with.
      evaluations: of each trained run, one after the other; their scores make its row.
    """

    name: str
    config: ConfigDict
    points: dict[str, dict[str, Any]]
    seeds: tuple[int, ...] = (0, 1, 2)
    evaluations: tuple[Evaluation, ...] = (Evaluation(),)

    @property
    def runs(self) -> list["Run"]:
        """All runs, seed by seed: an interrupted sweep has complete tables of fewer seeds."""
        return [Run(self, point, seed) for seed in self.seeds for point in self.points]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    sweep: Sweep
    point: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its workdir."""
        return f"{self.point}_seed{self.seed}"

    def config(
        self, places: dict[str, str] | None = None, overrides: dict[str, Any] | None = None
    ) -> ConfigDict:
        """The run's config.

        Args:
          places: paths of this machine by dotted field; None leaves "{data}" as it is.
          overrides: further fields, of an evaluation.

        Raises:
          UserError: an override names an unknown field or has the wrong type, or the sweep needs a
            folder of data that `places` doesn't name.
        """
        config = self.sweep.config.copy_and_resolve_references()
        config.seed = self.seed
        changes = {**self.sweep.points[self.point], **(overrides or {})}
        for field in _FOLDERS if places is not None else ():
            section, name = field.split(".")
            folder = changes.get(field, config[section][name])
            if "{data}" in folder:
                if not (places and places.get("data.path")):
                    raise UserError(
                        f"{self.sweep.name} needs the folder of its data: --set data.path=DIR"
                    )
                changes[field] = folder.replace("{data}", places["data.path"])
        for field, value in {**(places or {}), **changes}.items():
            section, _, name = field.partition(".")
            try:
                config[section][name] = value
            except (KeyError, AttributeError, TypeError) as error:
                raise UserError(
                    f"point {self.point}: {field}={value!r} can't be set: {error}"
                ) from error
        return config

    @property
    def config_hash(self) -> str:
        """A hash of the fields that differ from the defaults, without the paths of a machine.

        So it stays what it is when a field is added whose default changes nothing.
        """
        defaults = get_default_config()
        fields: dict[str, Any] = {"seed": self.seed}
        for section, values in self.config().items():
            for name, value in values.items() if isinstance(values, ConfigDict) else ():
                field = f"{section}.{name}"
                same = name in defaults[section] and value == defaults[section][name]
                if field not in MACHINE_PATHS and not same:
                    fields[field] = value
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def load_sweep(path: str) -> Sweep:
    """Load the sweep that a Python file defines.

    Raises:
      UserError: the file does not exist, or has no get_sweep().
    """
    spec = importlib.util.spec_from_file_location("sweep_file", path)
    if not pathlib.Path(path).is_file() or spec is None or spec.loader is None:
        raise UserError(f"there is no sweep file {path}; for example experiments/sweeps/digits.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # needed by dataclasses in the file
    spec.loader.exec_module(module)
    if not hasattr(module, "get_sweep"):
        raise UserError(f"{path} is no sweep: it has no function get_sweep")
    return module.get_sweep()


def select(sweep: Sweep, shard: str = "0/1", only: str = "") -> list[Run]:
    """Every n-th run from the i-th on, for shard "i/n", of the runs whose names match `only`.

    Raises:
      UserError: the shard or the regular expression can't be read, or no run's name matches.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    number, count = (int(x) for x in match.groups()) if match else (1, 1)
    if number >= count:
        raise UserError(f"--shard is {shard!r}; it must be i/n with i from 0 to n - 1, as in 0/4")
    try:
        runs = [run for run in sweep.runs if re.search(only, run.name)]
    except re.error as error:
        raise UserError(f"--only is {only!r}, which is no regular expression: {error}") from error
    if not runs:
        raise UserError(f"--only: no run of {sweep.name} has {only!r} in its name")
    return runs[number::count]


def parse_machine_paths(settings: list[str]) -> dict[str, str]:
    """Parse settings "field=value" to {field: value}.

    Raises:
      UserError: a field is not in MACHINE_PATHS.
    """
    places = dict(setting.partition("=")[::2] for setting in settings)
    for field in places:
        if field not in MACHINE_PATHS:
            raise UserError(
                f"--set {field}: only {', '.join(MACHINE_PATHS)} can be set; what decides scores "
                "belongs into the sweep's file"
            )
    return places
