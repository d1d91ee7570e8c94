"""Logs the progress of long computations."""

import logging
import time

log = logging.getLogger("soft_truncation")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class Progress:
    """Logs lines with a bar, the rate and the time left of a long computation."""

    def __init__(self, name: str, total: int, every: float = 5.0, compiles: bool = False) -> None:
        """Log the progress through `total` images every `every` seconds, and at the end.

        total = 0 means that the number is not known. What `compiles` first says so.
        """
        if compiles:
            log.info("%s | compiling, on a CPU for up to minutes; then %d images", name, total)
        self._name, self._total, self._every = name, total, every
        self._done = self._fresh = 0
        self._start = self._last = time.monotonic()

    def advance(self, count: int, note: str = "", fresh: bool = True) -> None:
        """Count `count` more images as done; if not `fresh`, an earlier run has computed them."""
        self._done += count
        self._fresh += count if fresh else 0
        now = time.monotonic()
        if not 0 < self._total <= self._done and now - self._last < self._every:
            return
        self._last = now
        rate = self._fresh / max(now - self._start, 1e-9)
        if not self._total:
            log.info("%s | %s images | %.3g images/s", self._name, f"{self._done:,}", rate)
            return
        share = self._done / self._total
        bar = "█" * int(16 * share) + "░" * (16 - int(16 * share))
        parts = [self._name, f"{bar} {share:4.0%}", f"{self._done}/{self._total} images"]
        if self._fresh:
            parts += [f"{rate:.3g} images/s", f"{clock((self._total - self._done) / rate)} left"]
        log.info("%s", " | ".join(parts + ([note] if note else [])))
