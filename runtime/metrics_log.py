"""Writes metrics of training to metrics.jsonl (one JSON object a line) and to TensorBoard."""

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

from runtime.files import can_do_without, write_text
from runtime.workdir import first_line

log = logging.getLogger("soft_truncation")


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl file, without damaged lines such as an incomplete last one."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            continue
        if all(isinstance(value, int | float) for value in row.values()):
            rows.append(row)
    return rows


class Metrics:
    """Writes metrics to metrics.jsonl and to TensorBoard's file."""

    def __init__(self, workdir: pathlib.Path, first_step: int) -> None:
        """Continue the file after `first_step`; rows of later steps are deleted."""
        path = workdir / "metrics.jsonl"
        if os.path.lexists(path):  # the steps after the checkpoint are repeated
            kept = [r for r in read_metrics(path) if r["step"] <= first_step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file, self._full = path.open("ab", buffering=0), False
        self._waiting = b""
        # TensorFlow's writer would take four seconds to import, and tensorboardX's SummaryWriter
        # waits forever when its disk is full.
        folder = workdir / "tensorboard"
        self._events: EventsWriter | None = None
        with can_do_without(folder):
            folder.mkdir(exist_ok=True)
            self._events = EventsWriter(f"{folder}/events", f".{os.getpid()}")

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
