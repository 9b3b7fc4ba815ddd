"""Run work in threads ahead of its consumer and hand out the results in order."""

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, Protocol, TypeVar

R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")

MAX_WORKERS = 16
PREFETCH_BATCHES = 3
PREFETCH_IMAGES = 64  # a fixed number, so that memory does not grow with the dataset


def default_workers(world_size: int = 1) -> int:
    """Decoding threads per process; one core per process is left for the model."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(MAX_WORKERS, (cores or 1) // world_size - 1))


class Submit(Protocol):
    """Start a job, in a thread or lazily; the returned function waits for its result."""

    def __call__(self, job: Callable[[], R]) -> Callable[[], R]: ...


class Prefetcher(Generic[S, T]):
    """Iterate over `make(start)` for each start, with `prefetch` results in progress.

    `make(start, submit)` submits its jobs and returns a function that waits for them and builds the
    result. With 0 workers each job runs when its result is requested.

    The threads end after the last result, when a job fails (`next` raises its exception), on
    `close`, when the iterator is garbage-collected, and before the interpreter exits.
    """

    def __init__(
        self,
        make: Callable[[S, Submit], Callable[[], T]],
        starts: Iterable[S],
        workers: int,
        prefetch: int = PREFETCH_BATCHES,
    ) -> None:
        self._make = make
        self._starts = iter(starts)
        self._pending: deque[Callable[[], T]] = deque()
        self._prefetch = prefetch if workers else 0
        self._submit: Submit = _run_lazily
        if workers:
            executor = ThreadPoolExecutor(workers, thread_name_prefix="vitcli-loader")
            self._submit = _submit_to(executor)
            # `finally` in a generator would run too late at exit, when modules are half unloaded.
            self._shutdown = weakref.finalize(
                self, executor.shutdown, wait=True, cancel_futures=True
            )

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            while len(self._pending) <= self._prefetch:
                start = next(self._starts, None)
                if start is None:
                    break
                self._pending.append(self._make(start, self._submit))
            if not self._pending:
                raise StopIteration
            return self._pending.popleft()()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the threads; the iterator is exhausted."""
        self._starts = iter(())
        self._pending.clear()
        if self._prefetch:
            self._shutdown()


def map_in_order(
    function: Callable[[int], T], indices: Iterable[int], workers: int
) -> Prefetcher[int, T]:
    """`function` of each index, computed in threads and returned in order."""
    return Prefetcher(
        lambda index, submit: submit(partial(function, index)), indices, workers, PREFETCH_IMAGES
    )


def _run_lazily(job: Callable[[], R]) -> Callable[[], R]:
    return job


def _submit_to(executor: ThreadPoolExecutor) -> Submit:
    def submit(job: Callable[[], R]) -> Callable[[], R]:
        future: Future[R] = executor.submit(job)
        return future.result

    return submit
