"""EpisodeEngine: multi-turn episodes behind the engine's door, each going on as soon as its own turn is there.

    engine = EpisodeEngine(ray_engine, tokenizer, lambda task: ToolEnvironment([calculator()]), EpisodeLimits())
    engine.submit([Request(prompt=task.prompt, task=task, sampling=Sampling(n=8), seed=0)])
    for ticket, sample, completion in engine.poll(1.0): ...

Whoever collects completions from an engine collects episodes from this one: same tickets, same order, one Completion
an episode. The same seeds give the same episodes as `run_episodes`, which goes turn by turn instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from time import monotonic

from cabochon.protocols import Finished, StreamingEngine, Weights
from cabochon.rollouts.environment import Environment, EpisodeLimits, Run, next_turns, opened
from cabochon.rollouts.stream import in_order
from cabochon.tokenizer import Tokenizer
from cabochon.types import Completion, Request, Task

POLL_SECONDS = 0.05
"""waited for the engine while environments are at work, and the other way round"""


class EpisodeEngine:
    """A StreamingEngine of episodes over one of turns. Requests name their `task`, of which the environment makes the
    prompt. An episode that the machine broke comes back with `finish` "abort"."""

    def __init__(
        self,
        engine: StreamingEngine,
        tokenizer: Tokenizer,
        environment: Callable[[Task], Environment],
        limits: EpisodeLimits = EpisodeLimits(),
    ):
        self._engine, self._tokenizer, self._environment, self._limits = engine, tokenizer, environment, limits
        self._pool = ThreadPoolExecutor(limits.parallel, thread_name_prefix="environment")
        self._tickets = 0
        self._ticket: dict[Run, int] = {}
        """of every episode under way"""
        self._drawing: dict[tuple[int, int], Run] = {}
        """by ticket and sample of the inner engine: whose turn is being drawn"""
        self._answering: dict[Future[None], Run] = {}
        self._out: list[Finished] = []

    @property
    def version(self) -> int:
        return self._engine.version

    def load(self, weights: Weights) -> None:
        self._engine.load(weights)

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Reset the environments and queue the first turns; a ticket per request. Raises UserError, before anything is
        queued, where one has no task or its prompt leaves no room."""
        runs = opened(self._pool, self._tokenizer, self._environment, requests, self._limits)
        first = self._tickets + 1
        self._tickets += len(requests)
        for run in runs:
            self._ticket[run] = first + run.index
        self._go_on(runs)
        return list(range(first, self._tickets + 1))

    def poll(self, seconds: float) -> list[Finished]:
        """Episodes that ended since the last call; waits up to about `seconds` for the first."""
        deadline = monotonic() + seconds
        while True:
            left = max(0.0, deadline - monotonic())
            if self._drawing:
                for turn in self._engine.poll(min(left, POLL_SECONDS) if self._answering or self._out else left):
                    self._take(turn)
            done, _ = wait(self._answering, 0.0 if self._drawing or self._out else left, FIRST_COMPLETED)
            self._go_on([self._answered(future) for future in done])
            if self._out or monotonic() >= deadline or not (self._drawing or self._answering):
                out, self._out = self._out, []
                return out

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All episodes of all requests, in order."""
        completions, others = in_order(self, requests)
        self._out = others + self._out
        return completions

    def abort(self, tickets: Sequence[int]) -> None:
        """Forget these episodes. One whose environment is at work is closed once it has answered."""
        gone = set(tickets)
        self._out = [f for f in self._out if f.ticket not in gone]
        mine = [key for key, run in self._drawing.items() if self._ticket[run] in gone]
        self._engine.abort(sorted({ticket for ticket, _ in mine}))
        for key in mine:
            self._drop(self._drawing.pop(key))
        for run in self._answering.values():
            if self._ticket.get(run) in gone:
                del self._ticket[run]

    def close(self) -> None:
        """Forget everything; the inner engine stays open."""
        self.abort(list(self._ticket.values()))
        self._pool.shutdown()
        for run in self._answering.values():
            run.environment.close()
        self._answering.clear()

    def _take(self, turn: Finished) -> None:
        """A turn came back: the environment's turn now."""
        run = self._drawing.pop((turn.ticket, turn.sample))
        run.take(turn.completion)
        self._answering[self._pool.submit(run.answer)] = run

    def _answered(self, future: Future[None]) -> Run:
        run = self._answering.pop(future)
        try:
            future.result()
        except BaseException:  # a bug in the environment
            self._drop(run)
            raise
        return run

    def _go_on(self, runs: Sequence[Run]) -> None:
        """Hand over what ended and ask for the next turn of the rest."""
        for run in runs:
            if run in self._ticket and run.ended is not None:
                self._out.append(Finished(self._ticket[run], run.sample, run.episode().completion))
            if run not in self._ticket or run.ended is not None:  # aborted meanwhile, or over
                self._drop(run)
        batch = next_turns([run for run in runs if run in self._ticket])
        for ticket, (_, members) in zip(self._engine.submit([r for r, _ in batch]), batch, strict=True):
            self._drawing |= {(ticket, sample): run for sample, run in enumerate(members)}

    def _drop(self, run: Run) -> None:
        self._ticket.pop(run, None)
        run.environment.close()
