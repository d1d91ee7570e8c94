"""The config that a run saves in its workdir; main.py uses it if --config is not given."""

import json
import os
import pathlib
import stat
from typing import Any

from ml_collections import ConfigDict

from configs.default import get_default_config
from configs.errors import UserError
from configs.old_names import without_defaults

_MOST_BYTES, _DEEPEST = 2**24, 16  # of a file of JSON that a run or a model has


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object from a file that a stranger may have made.

    Raises:
      OSError: it can't be read.
      ValueError: it is no regular file, too large, nested too deeply, or no object.
    """
    # Opening a pipe would wait for its other end.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no file")
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"it is larger than {_MOST_BYTES >> 20} MiB")
    try:
        fields = json.loads(text)
    except RecursionError:
        fields = None
    if not isinstance(fields, dict) or _is_deep(fields, _DEEPEST):
        raise ValueError("it is no object, or nested too deeply")
    return fields


def _is_deep(value: Any, most: int) -> bool:
    """Whether a value of JSON is nested more than `most` times."""
    parts = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, dict | list)
    return nested and (not most or any(_is_deep(part, most - 1) for part in parts))


def read(workdir: str | pathlib.Path) -> dict[str, Any]:
    """Read the fields in a workdir's config.json.

    Raises:
      UserError: the file can't be read or is damaged.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        fields = read_object(path)
        for section, default in get_default_config().items():
            if isinstance(default, ConfigDict) and not isinstance(fields.get(section, {}), dict):
                raise ValueError(f"its {section!r} is none of a config's")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); choose another --workdir") from error
    return fields


def as_recorded(config: ConfigDict) -> dict[str, Any]:
    """The fields of a config as a run's config.json has them."""
    return json.loads(config.to_json_best_effort())


def get_config(workdir: str | pathlib.Path) -> ConfigDict:
    """The config of a run; fields that did not exist then have their defaults.

    Raises:
      UserError: the file can't be read or is damaged.
    """
    return config_of(read(workdir), workdir)


def config_of(recorded: dict[str, Any], workdir: str | pathlib.Path) -> ConfigDict:
    """The config of the fields that `read` returned for `workdir`, as `get_config`."""
    config = get_default_config()
    for section, fields in recorded.items():
        if section == "config_file":
            continue
        try:
            if not isinstance(fields, dict):
                config[section] = fields
                continue
            if section == "data":
                fields = without_defaults(fields)
            with config[section].unlocked():
                for name, value in fields.items():
                    config[section][name] = tuple(value) if isinstance(value, list) else value
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            path = pathlib.Path(workdir) / "config.json"
            reason = f"its {section!r} is none of a config's"
            raise UserError(f"{path} is damaged ({reason}); choose another --workdir") from error
    return config
