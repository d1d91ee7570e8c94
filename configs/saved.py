"""The config that a run saves in its workdir; main.py uses it if --config is not given."""

import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from configs.default import UserError, get_default_config


def read(workdir: str | pathlib.Path) -> dict[str, Any]:
    """Read the fields in a workdir's config.json.

    Raises:
      UserError: the file can't be read or is damaged.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        fields = json.loads(path.read_text())
        if not isinstance(fields, dict):
            raise ValueError("it is no object")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); choose another --workdir") from error
    return fields


def get_config(workdir: str | pathlib.Path) -> ConfigDict:
    """The config of a run; fields that did not exist then have their defaults.

    Raises:
      UserError: the file can't be read or is damaged.
    """
    config = get_default_config()
    for section, fields in read(workdir).items():
        if section == "config_file":
            continue
        try:
            if not isinstance(fields, dict):
                config[section] = fields
                continue
            with config[section].unlocked():
                for name, value in fields.items():
                    config[section][name] = tuple(value) if isinstance(value, list) else value
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            path = pathlib.Path(workdir) / "config.json"
            reason = f"its {section!r} is none of a config's"
            raise UserError(f"{path} is damaged ({reason}); choose another --workdir") from error
    return config
