"""Which task is next: a pure function of a seed and an index, so that one number is enough to go on from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from cabochon.errors import UserError
from cabochon.types import Task

_BLOCK, _LONGEST_BLOCK = 256, 1 << 16
"""groups over which the shares hold; more where a share is so small that it would not have one of them"""


class Schedule:
    """An endless order of tasks: domains mixed by share, each domain in a new random order whenever it is through.

    `shares`: domain -> relative share; a domain that is not named counts with its number of tasks, one with 0 is left
    out. Raises UserError for a domain there is none of, or shares that leave nothing; `where`: their place in the
    recipe.
    """

    def __init__(self, tasks: Sequence[Task], shares: Mapping[str, float], seed: int, where: str = "tasks.shares"):
        self._seed = seed
        domains: dict[str, list[Task]] = {}
        self._by_id = {task.id: task for task in tasks}
        for task in tasks:
            domains.setdefault(task.domain, []).append(task)
        if unknown := sorted(set(shares) - set(domains)):
            raise UserError(f"{where}.{unknown[0]}: there are tasks of the domains {', '.join(domains)} only")
        weights = {d: shares.get(d, float(len(t))) for d, t in domains.items()}
        self._domains = [t for d, t in domains.items() if weights[d] > 0]
        if not self._domains:
            raise UserError(f"{where}: every domain has share 0")
        kept = [w for w in weights.values() if w > 0]
        block = min(_LONGEST_BLOCK, max(_BLOCK, math.ceil(sum(kept) / min(kept))))
        counts = [max(1, round(block * w / sum(kept))) for w in kept]
        self._block = np.repeat(np.arange(len(counts)), counts)
        self._counts = counts

    def __getitem__(self, index: int) -> Task:
        """The task of the group with this index, counted from 0."""
        domain, nth = self._domain(index)
        tasks = self._domains[domain]
        turn, which = divmod(nth, len(tasks))
        return tasks[int(np.random.default_rng((self._seed, 1 + domain, turn)).permutation(len(tasks))[which])]

    def domain(self, index: int) -> list[Task]:
        """The tasks of the domain whose turn it is at this index."""
        return self._domains[self._domain(index)[0]]

    def _domain(self, index: int) -> tuple[int, int]:
        """Which domain's turn it is, and how many it had before."""
        block, place = divmod(index, len(self._block))
        order = np.random.default_rng((self._seed, 0, block)).permutation(self._block)
        domain = int(order[place])
        return domain, block * self._counts[domain] + int((order[:place] == domain).sum())

    def by_id(self, task: str) -> Task:
        """Raises KeyError."""
        return self._by_id[task]
