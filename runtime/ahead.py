"""Applying a function to a stream of items in threads, ahead of whoever takes the results."""

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
      function: is called by several threads at once.
      items: taken in their order, by the thread that takes the results.
      threads: how many there are.
      ahead: the number of items that are begun before their results are taken.
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
