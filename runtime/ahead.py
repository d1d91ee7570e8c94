"""Applies a function to a stream of items in threads, before the results are needed."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int
) -> Iterator[Result]:
    """Yield the result for each item, in order.

    Args:
      function: called by several threads at the same time.
      items: read in order, by the thread that reads the results.
      threads: the number of threads.
      ahead: the number of items that are started before their results are read.
    """
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    pending: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # the program should not wait for results that nobody takes
        pool.shutdown(wait=False, cancel_futures=True)
