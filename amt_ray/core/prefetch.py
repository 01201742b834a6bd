"""The next batch is made while the device works on this one."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def ahead(make: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """``map(make, items)``, each made in a thread while the one before is in use.

    Args:
        make: A function of its argument and of nothing that the user of the results changes.
        items: Its arguments.

    Yields:
        Results in order; an error of ``make`` comes where its result would.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        coming = None
        for item in items:
            ready, coming = coming, thread.submit(make, item)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


class Waits(Iterator[T]):
    """Adds up how long its user waits for the next item.

    Attributes:
        waited_s: Seconds so far.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items, self.waited_s = items, 0.0

    def __next__(self) -> T:
        asked = time.monotonic()
        try:
            return next(self._items)
        finally:
            self.waited_s += time.monotonic() - asked
