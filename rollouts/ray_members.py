"""What RayEngine knows of its workers and their work, and which worker gets what."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cabochon.rollouts.prefix import common
from cabochon.types import Completion, Request


@dataclass(kw_only=True)
class EngineCounters:
    """Since the engine began."""

    delivered: int = 0
    """samples"""
    workers_lost: int = 0
    reissued: int = 0
    """samples that were begun again on another worker"""
    republished: int = 0
    """times a version was published again because a worker could not use what it got"""
    reused_tokens: int = 0
    """of prompts, whose keys and values a worker still had from an earlier turn (`SlotConfig.reuse`)"""


@dataclass(kw_only=True, eq=False)
class Work:
    ticket: int
    request: Request
    """its prompt is the ids below"""
    prompt_P: np.ndarray
    cost: int
    """tokens expected: prompt and all samples at their longest"""
    missing: set[int]
    """samples not delivered yet"""
    losses: int = 0
    """workers lost while they had it"""


@dataclass(kw_only=True, eq=False)
class Member:
    """A worker as the engine sees it."""

    name: str
    actor: Any
    loading: Any = None
    loading_since: float = 0.0
    target: int = -1
    """publication being loaded"""
    copy: int = 0
    """how often it had been published when the worker was told to load it"""
    serves: int | None = None
    """publication it draws from; None until it can serve"""
    polling: Any = None
    polling_since: float = 0.0
    pid: int | None = None
    node: str = ""
    work: dict[int, Work] = field(default_factory=dict)
    ended: deque[np.ndarray]
    """tokens of the sequences it ended last, with the weights it has, as many as it may still hold"""
    reused: int = 0
    """what it last said of `reused_tokens`"""

    @property
    def samples(self) -> int:
        return sum(len(w.missing) for w in self.work.values())

    @property
    def cost(self) -> int:
        return sum(w.cost for w in self.work.values())


def whole(completion: Completion) -> np.ndarray:
    """[P + T] int32: prompt and completion, with which a next turn would begin."""
    assert completion.prompt_tokens is not None
    return np.concatenate([completion.prompt_tokens, completion.tokens])


def choose(free: Sequence[Member], prompt_P: np.ndarray, reuse: int) -> Member:
    """Who is given a prompt: who ended the earlier turns that it goes on from, `reuse` tokens of it or more (0: nobody
    is asked for that), else who has the least work before it."""

    def shared(m: Member) -> int:
        most = max((common(tokens, prompt_P) for tokens in m.ended), default=0)
        return most if most >= reuse else 0

    return max(free, key=lambda m: (shared(m) if reuse else 0, -m.cost))
