"""Working ahead: results in order, made by threads while the one before is used."""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, Protocol, TypeVar

R = TypeVar("R")
T = TypeVar("T")

PREFETCH = 3
IMAGES = 64  # of `in_order`: memory does not grow with the set


class Pool(Protocol):
    """Starts a job, now or in a thread; calling what comes back waits for its result."""

    def __call__(self, job: Callable[[], R]) -> Callable[[], R]: ...


class WorkAhead(Generic[T]):
    """An iterator over `make(start)` for each start, with `prefetch` of them under way.

    The threads end when the last result was taken, when a job fails (its exception comes out of
    `next`), on `close`, when the iterator is dropped, and before the interpreter exits.

    Args:
        make: given a start and a pool, hands its jobs to the pool and returns what waits for them
            and puts the result together.
        starts: one for each result.
        workers: threads; 0 does each job when its result is asked for.
        prefetch: results, from 1 on.
    """

    def __init__(
        self,
        make: Callable[[int, Pool], Callable[[], T]],
        starts: Iterable[int],
        workers: int,
        prefetch: int = PREFETCH,
    ) -> None:
        self._make = make
        self._starts = iter(starts)
        self._waiting: deque[Callable[[], T]] = deque()
        self._prefetch = prefetch if workers else 0
        self._pool: Pool = _inline
        if workers:
            executor = ThreadPoolExecutor(workers, thread_name_prefix="vitcli-loader")
            self._pool = _threaded(executor)
            # Not a generator's `finally`: that would run when half of Python is gone at exit.
            self._end = weakref.finalize(self, executor.shutdown, wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            while len(self._waiting) <= self._prefetch:
                start = next(self._starts, None)
                if start is None:
                    break
                self._waiting.append(self._make(start, self._pool))
            if not self._waiting:
                raise StopIteration
            return self._waiting.popleft()()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the threads; there are no further results."""
        self._starts = iter(())
        self._waiting.clear()
        if self._prefetch:
            self._end()


def in_order(work: Callable[[int], T], indices: Iterable[int], workers: int) -> WorkAhead[T]:
    """`work` of each index, in order, each by one thread; ends as `WorkAhead` does."""
    return WorkAhead(lambda index, pool: pool(partial(work, index)), indices, workers, IMAGES)


def _inline(job: Callable[[], R]) -> Callable[[], R]:
    return job


def _threaded(executor: ThreadPoolExecutor) -> Pool:
    def start(job: Callable[[], R]) -> Callable[[], R]:
        future: Future[R] = executor.submit(job)
        return future.result

    return start
