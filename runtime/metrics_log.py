"""Metrics of training, written to metrics.jsonl (one JSON object per line) and TensorBoard."""

import contextlib
import json
import logging
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from runtime import environment
from runtime.workdir import first_line

log = logging.getLogger("soft_truncation")


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl file; an incomplete last line is ignored."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discard what is written to the process's stderr, by C++ code too; exceptions are raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Metrics:
    """Writes metrics to metrics.jsonl, and to TensorBoard if TensorFlow is installed."""

    def __init__(self, workdir: pathlib.Path, first_step: int) -> None:
        """Continue after `first_step`; rows of later steps are deleted."""
        path = workdir / "metrics.jsonl"
        if path.exists():  # the steps after the checkpoint are repeated
            kept = [r for r in read_metrics(path) if r["step"] <= first_step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            partial.replace(path)
        self._file, self._full = path.open("ab", buffering=0), False
        self._waiting = b""
        try:
            with _quiet_stderr():  # TensorFlow's C++ code prints a greeting at any log level
                environment.hide_gpus_from_tensorflow()
                from clu import metric_writers

            self._writer = metric_writers.SummaryWriter(str(workdir / "tensorboard"))
        except ImportError:
            log.info("TensorFlow is not installed: metrics are only written to %s", path)
            self._writer = None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one row; while the disk is full, rows are kept in memory."""
        self._waiting += json.dumps({"step": step, **values}).encode() + b"\n"
        self._flush()
        if self._writer is not None:
            try:
                self._writer.write_scalars(step, values)
            except Exception as error:  # TensorFlow's own errors
                log.warning("TensorBoard's file can't be written (%s)", first_line(error))
                self._writer = None

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._full = False
        except OSError as error:
            if not self._full:
                log.warning("metrics.jsonl can't be written now: %s", error.strerror)
            self._full = True

    def close(self) -> None:
        """Write the rows that are still in memory, and close all files."""
        self._flush()
        self._file.close()
        if self._writer is not None:
            self._writer.close()
