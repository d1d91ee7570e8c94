"""Metrics of training, written to metrics.jsonl (one JSON object per line) and TensorBoard."""

import contextlib
import json
import logging
import os
import pathlib
import time
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

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


class Metrics:
    """Writes metrics to metrics.jsonl, and for TensorBoard."""

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
        # TensorFlow's writer would take four seconds to import, and tensorboardX's SummaryWriter
        # waits forever when its disk is full.
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._events: EventsWriter | None = EventsWriter(f"{folder}/events", f".{os.getpid()}")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one row; while the disk is full, rows are kept in memory."""
        self._waiting += json.dumps({"step": step, **values}).encode() + b"\n"
        self._flush()
        if self._events is not None:
            try:
                for name, value in values.items():
                    summary = scalar(name, value)
                    self._events.write_event(
                        Event(wall_time=time.time(), step=step, summary=summary)
                    )
                self._events.flush()
            except OSError as error:
                log.warning("TensorBoard's file can't be written (%s)", first_line(error))
                self._close_events()

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
        self._close_events()

    def _close_events(self) -> None:
        if self._events is not None:
            with contextlib.suppress(OSError):  # a failing disk has been told of
                self._events.close()
            self._events = None
