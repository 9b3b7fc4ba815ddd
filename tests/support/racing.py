"""Call a function in several processes at the same moment, again and again."""

import multiprocessing
from collections.abc import Callable
from typing import Any

from vitcli.errors import VitcliError


def race(action: Callable[[int, int], Any], *, processes: int = 4, rounds: int = 20) -> list[list]:
    """rounds x processes results of `action(round, process)`; a `VitcliError` is its message.

    A barrier starts every round. The processes are forks, so that `action` may be a closure.
    """
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(processes), context.SimpleQueue()

    def work(process: int) -> None:
        found = []
        for number in range(rounds):
            barrier.wait(60)
            try:
                found.append(action(number, process))
            except VitcliError as error:
                found.append(f"error: {error.message}")
            except BaseException as error:
                found.append(f"bug: {error!r}")
        results.put((process, found))

    members = [context.Process(target=work, args=(i,)) for i in range(processes)]
    for member in members:
        member.start()
    by_process = dict(results.get() for _ in members)
    for member in members:
        member.join()
    return [[by_process[i][number] for i in range(processes)] for number in range(rounds)]
