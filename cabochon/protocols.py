"""The doors between rooms; no jax, so a bare worker can import them. Each has a contract suite in tests/contracts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from cabochon.types import Completion, Request, Rollout, Score, Task, Verdict


@runtime_checkable
class Verifier(Protocol):
    """Scores text that can be checked."""

    def verify(self, task: Task, text: str) -> Verdict:
        """The verdict on `text` as an answer to `task`. Never raises for what a model wrote.

        Raises ValueError where the *task* is unusable (no gold answer, tests that do not parse).
        """
        ...


@runtime_checkable
class Reward(Protocol):
    """Scores completions with a model: a scalar reward model or a judge. It does not change while it is in use."""

    @property
    def model_id(self) -> str:
        """A hash of everything that decides its scores; each score carries it."""
        ...

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One score per rollout, in their order. What cannot be scored has no value and a status that says why; the
        call raises for nothing that a policy wrote or a server did.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightProbe:
    """Token sequences with the log-probs the learner's forward pass gives them: an engine that took the weights over
    rightly computes the same. Each row is a prompt and then one token, repeated.
    """

    tokens: np.ndarray
    """[N, T] int32"""
    prompt: int
    """P, the first tokens of each row; the other T - P are equal"""
    logprobs: np.ndarray
    """[N, T - P] f32, nats, of the tokens after the prompt"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """A policy's parameters at one learner step, on their way to an engine."""

    version: int
    """the learner step that made them"""
    params: Mapping[str, Any]
    """the policy's whole tree of arrays, device or host; low-rank additions already merged in"""
    probe: WeightProbe | None = None


class Piece(NamedTuple):
    """A run of bytes of one tensor: where it lies."""

    chunk: int
    offset: int
    nbytes: int


class TensorEntry(NamedTuple):
    """One tensor of a published version."""

    name: str
    """its path in the tree, `blocks/0/0/attn/qkv/w`"""
    dtype: str
    shape: tuple[int, ...]
    crc32: int
    """of its bytes in C order"""
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """What was published: every tensor with its place and checksum, and what the engine must reproduce."""

    version: int
    tensors: tuple[TensorEntry, ...]
    chunks: tuple[int, ...]
    """bytes of each"""
    probe: WeightProbe | None


@runtime_checkable
class WeightStore(Protocol):
    """Where the learner leaves its weights and the engines pull them from, by version; the oldest are dropped."""

    def publish(self, weights: Weights) -> Manifest:
        """Store a host copy. A version that is there already is replaced."""
        ...

    def latest(self) -> int | None:
        """The version published last; None before the first."""
        ...

    def fetch(self, version: int) -> Weights:
        """Host arrays, to be read only. Raises MachineError naming version and tensor where something is lost or is
        not what was published.
        """
        ...


@runtime_checkable
class PolicyEngine(Protocol):
    """Continues prompts."""

    @property
    def version(self) -> int:
        """Of the weights that the next token will be drawn with."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All samples of the first request, then all of the second, and so on, whatever order they finish in.

        Raises UserError, before anything is drawn, where a request cannot be met.
        """
        ...

    def load(self, weights: Weights) -> None:
        """Draw from these weights from now on. Raises UserError where they are of another model."""
        ...


class Finished(NamedTuple):
    """One sample of a submitted request."""

    ticket: int
    sample: int
    completion: Completion


@runtime_checkable
class StreamingEngine(PolicyEngine, Protocol):
    """An engine that can be given work and asked for results at any time. Weights loaded meanwhile are used from the
    next token on; the completion says for each token which version drew it.
    """

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Queue them; one ticket each. Raises UserError, before anything is queued, where one cannot be met."""
        ...

    def poll(self, seconds: float) -> list[Finished]:
        """What finished since the last call, each sample once; waits up to about `seconds` for the first."""
        ...

    def abort(self, tickets: Sequence[int]) -> None:
        """Forget them: none of their samples is delivered from now on."""
        ...
