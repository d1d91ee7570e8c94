"""Fields that have another name now, and are still read by the old one."""

import logging
from typing import Any

from ml_collections import ConfigDict

log = logging.getLogger("soft_truncation")

# old name → name
DATA = {"tfrecords_path": "path"}


class DataSection(ConfigDict):
    """The section `data` of a config, whose fields also have the names in `DATA`."""

    def __setitem__(self, key: str, value: Any) -> None:
        """Set a field; an old name that is empty says nothing."""
        if key not in DATA:
            super().__setitem__(key, value)
        elif value:
            log.warning("config.data.%s is called %s now", key, DATA[key])
            super().__setitem__(DATA[key], value)

    def __getitem__(self, key: str) -> Any:
        """The value of a field."""
        return super().__getitem__(DATA.get(key, key))

    def get_type(self, key: str) -> Any:
        """The type of a field, which a flag is parsed by."""
        return super().get_type(DATA.get(key, key))


def without_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """The recorded fields of a run's section `data`, without an old name that did not count.

    Recipes set `tfrecords_path`, which counted where neither `path` nor `tfds_dir` was given.
    """
    known = fields.get("path") or fields.get("tfds_dir")
    return {name: value for name, value in fields.items() if not (known and name in DATA)}
