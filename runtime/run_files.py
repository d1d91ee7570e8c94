"""The files of a run that the main process keeps open during training."""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from configs.parts import Loop
from runtime import checkpointing, exported
from runtime.locking import locked
from runtime.metrics_log import Metrics
from runtime.provenance import logged
from runtime.workdir import (
    claim_workdir,
    make_folder,
)


class RunFiles:
    """The files that the main process keeps open during training."""

    def __init__(
        self,
        fields: Mapping[str, Any],
        workdir: pathlib.Path,
        stack: contextlib.ExitStack,
        override: bool,
        config_file: str,
    ) -> None:
        """Open nothing yet; `stack` closes the files that are opened later."""
        self._fields, self._workdir, self._stack = fields, workdir, stack
        self._override, self._config_file = override, config_file

    def record(self) -> None:
        """Write the config to the workdir, in place of the one that its files were saved under."""
        claim_workdir(self._fields, self._workdir, True, self._override, self._config_file)

    def open(self, shape: checkpointing.State, loop: Loop) -> checkpointing.State | None:
        """Lock the workdir, and return the newest state, or None if there is none."""
        workdir = self._workdir
        exported.refuse(workdir)
        claim_workdir(self._fields, workdir, record=False, override=self._override)
        make_folder(workdir, "--workdir")
        self._stack.enter_context(locked(workdir))
        self._stack.enter_context(logged(workdir / "log.txt"))
        manager = self._stack.enter_context(checkpointing.checkpoints(workdir, loop.snapshot_freq))
        state = checkpointing.restore_newest(manager, shape)
        on_first = None if state is None else self.record
        self.saver = checkpointing.Saver(manager, loop.max_failed_saves, on_first)
        self.metrics = Metrics(workdir, 0 if state is None else int(state.step))
        self._stack.callback(self.metrics.close)
        return jax.tree.map(np.asarray, state)
