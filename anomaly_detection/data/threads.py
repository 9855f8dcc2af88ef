"""Work in threads, in order and in bounded memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_threads(
    function: Callable[[T], R], items: Iterable[T], num_threads: int | None = None, ahead: int = 0
) -> Iterator[R]:
    """The function's results, in the order of the items.

    Args:
        function: Its work should be in C code that releases Python's lock.
        items: Taken as threads become free.
        num_threads: By default one for each core.
        ahead: Results that may wait besides one for each thread.
    """
    num_threads = num_threads or os.cpu_count() or 1
    remaining, waiting = iter(items), deque[Future[R]]()
    with ThreadPoolExecutor(num_threads) as pool:
        while True:
            free = 2 * num_threads + ahead - len(waiting)
            waiting.extend(pool.submit(function, item) for item in islice(remaining, free))
            if not waiting:
                return
            yield waiting.popleft().result()
