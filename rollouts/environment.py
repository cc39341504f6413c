"""Multi-turn episodes: the policy writes a turn, an environment answers, and all of it becomes one Completion.

What the policy sampled is carried from turn to turn as the very ids it drew. What stands between two turns comes from
the chat template, as the part of a rendering that follows the last assistant's text, so earlier turns are never
rewritten (a template that drops old thinking would do so) nor tokenised again. Everything the policy did not draw is
context: mask 0, log-prob 0 (algorithms.md section 0, convention 2).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from cabochon.chat import encode_chat
from cabochon.errors import MachineError, UserError
from cabochon.protocols import PolicyEngine
from cabochon.rollouts.thinking import TAG_TOKENS
from cabochon.rollouts.turns import between_turns, joined, nothing, readable, show_tools
from cabochon.tokenizer import Tokenizer
from cabochon.types import Completion, Message, Request, Sampling, Span, Task

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Step:
    """What an environment makes of one turn."""

    observation: tuple[Message, ...] = ()
    """what the policy is shown next; not shown where the episode ends here"""
    reward: float | None = None
    """None where this turn earns nothing that could be said yet"""
    done: bool = False


@runtime_checkable
class Environment(Protocol):
    """The other side of one episode; a fresh one is made for each, all at once, so what costs belongs into `reset`.

    It may raise MachineError where the machine failed: the episode is then aborted, never scored.
    """

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """JSON schemas of what the policy may call, for the chat template; empty for none."""
        ...

    def reset(self, task: Task) -> Sequence[Message]:
        """The conversation up to the policy's first turn."""
        ...

    def step(self, text: str) -> Step:
        """Answer the policy's turn: its text without the end-of-turn token, thinking included."""
        ...

    def close(self) -> None:
        """The episode is over, however it ended. Called once."""
        ...


@dataclass(frozen=True, kw_only=True)
class EpisodeLimits:
    """Where an episode ends at the latest. A turn's own limit is `Sampling.max_tokens`."""

    turns: int = 8
    """of the policy"""
    tokens: int = 1024
    """prompt and episode together; at most what the engine holds"""
    seconds: float = 120.0
    """spent in the environment, over all turns; more than that in `reset` is a failure of the machine"""
    observation_chars: int = 4000
    """of one message; the middle of a longer one is left out, with a note"""
    parallel: int = 8
    """environments that are stepped at one time"""

    def __post_init__(self) -> None:
        for name in ("turns", "tokens", "seconds", "observation_chars", "parallel"):
            if getattr(self, name) <= 0:
                raise UserError(f"EpisodeLimits.{name}={getattr(self, name)}; expected more than 0")


Ended = Literal["done", "turns", "tokens", "seconds", "failed"]
"""By the environment, by a limit (`tokens`: of the episode or of a turn), or by the machine."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """One episode.

    Example, a calculator asked once: `completion.tokens` are `<tool_call>..2+2..</tool_call><|im_end|>` (mask 1), then
    `\\n<|im_start|>tool\\n4<|im_end|>\\n<|im_start|>assistant\\n` (mask 0), then `Four.<|im_end|>` (mask 1); `turns`
    are the two spans with mask 1.
    """

    completion: Completion
    """All turns and what stands between them. It ends with a token the policy drew. `text`, `thinking` and `answer` are
    those of the last turn, which is what a verifier judges. `finish`: `stop` where the environment ended it, `abort`
    where the machine failed (train on nothing of it, try again), `length` for every limit. `reward` is the sum of what
    turns earned, None where none did."""
    messages: tuple[Message, ...]
    """the conversation, the last turn included, for people to read"""
    turns: tuple[Span, ...]
    rewards: tuple[float | None, ...]
    """per turn"""
    ended: Ended
    detail: str
    """of a failure, one line"""
    seconds: float
    """spent in the environment"""


def run_episodes(
    engine: PolicyEngine,
    tokenizer: Tokenizer,
    environment: Callable[[Task], Environment],
    tasks: Sequence[Task],
    sampling: Sampling,
    seeds: Sequence[int],
    limits: EpisodeLimits = EpisodeLimits(),
) -> list[Episode]:
    """`sampling.n` episodes of the first task, then of the second, and so on; `seeds`, one per task, decide them.

    All episodes advance together: one batch of the engine a turn, environments stepped side by side in between.
    `environment` makes the other side of one episode; where the chat template has no place for its tools, their schemas
    go into the system message.

    Raises UserError, before anything is drawn, for a prompt that leaves no room, and where the engine refuses.
    """
    if len(seeds) != len(tasks):
        raise UserError(f"{len(seeds)} seeds for {len(tasks)} tasks; expected one per task")
    requests = [Request(prompt=t.prompt, sampling=sampling, seed=s, task=t) for t, s in zip(tasks, seeds, strict=True)]
    with ThreadPoolExecutor(limits.parallel, thread_name_prefix="environment") as pool:
        runs = opened(pool, tokenizer, environment, requests, limits)
        try:
            while live := [run for run in runs if run.ended is None]:
                batch = next_turns(live)
                turns = iter(engine.generate([request for request, _ in batch]))
                for _, members in batch:
                    for run in members:
                        run.take(next(turns))
                list(pool.map(Run.answer, live))
        finally:
            for run in runs:
                run.environment.close()
    return [run.episode() for run in runs]


def opened(
    pool: ThreadPoolExecutor,
    tokenizer: Tokenizer,
    environment: Callable[[Task], Environment],
    requests: Sequence[Request],
    limits: EpisodeLimits,
) -> list[Run]:
    """The samples of all requests, their environments reset. Raises UserError, with all of them closed again."""
    if missing := [i for i, request in enumerate(requests) if request.task is None]:
        raise UserError(f"request {missing[0]}: no task; an episode needs one to make its environment")
    runs = [
        Run(i, sample, request.task, environment(request.task), tokenizer, request, limits)
        for i, request in enumerate(requests)
        if request.task is not None
        for sample in range(request.sampling.n)
    ]
    try:
        list(pool.map(Run.begin, runs))
    except BaseException:
        for run in runs:
            run.environment.close()
        raise
    return runs


def next_turns(runs: Sequence[Run]) -> list[tuple[Request, list[Run]]]:
    """Requests for a turn of each, in order, and whose samples they are. Samples of one task that begin alike are one
    request, so that its prompt is read once; later turns have prompts and seeds of their own."""
    asked = [(run, run.request()) for run in runs]
    groups: dict[tuple[int, int, int, bytes], list[tuple[Run, Request]]] = {}
    for each in asked:
        groups.setdefault(_key(*each), []).append(each)
    return [
        (replace(g[0][1], sampling=replace(g[0][1].sampling, n=len(g))), [run for run, _ in g])
        for g in groups.values()
    ]


def _key(run: Run, request: Request) -> tuple[int, int, int, bytes]:
    """Equal for those that can share a request."""
    assert isinstance(request.prompt, np.ndarray)
    return run.index, run.sample if run.turns else 0, request.seed, request.prompt.tobytes()


@dataclass(eq=False)
class Run:
    """An episode under way: `begin`, then by turns `request`, `take` what the engine made of it, and `answer`, until it
    has `ended`."""

    index: int
    """of its request"""
    sample: int
    task: Task
    environment: Environment
    tokenizer: Tokenizer
    origin: Request
    limits: EpisodeLimits
    prompt: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    pending: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """context that stands before the next turn; part of the episode only once that turn is drawn"""
    messages: list[Message] = field(default_factory=list)
    tools: list[Mapping[str, Any]] | None = None
    whole: Completion | None = None
    """the turns so far and what stands between them"""
    turns: list[Span] = field(default_factory=list)
    rewards: list[float | None] = field(default_factory=list)
    ended: Ended | None = None
    detail: str = ""
    seconds: float = 0.0

    def begin(self) -> None:
        opening = self._ask(self.environment.reset, self.task)
        if opening is None:
            return
        self.messages, self.tools = show_tools(self.tokenizer, opening, self.environment.tools)
        self.prompt = np.array(
            encode_chat(self.tokenizer, self.messages, tools=self.tools, add_generation_prompt=True), np.int32
        )
        if len(self.prompt) + self._least() > self.limits.tokens:
            raise UserError(
                f"task {self.task.id}: the prompt has {len(self.prompt)} tokens, which leaves no room for a turn in "
                f"limits.tokens={self.limits.tokens}; shorten it or raise the limit"
            )

    def request(self) -> Request:
        """The next turn. The first has the task's seed, later ones a seed of sample and turn."""
        so_far = [self.prompt] if self.whole is None else [self.prompt, self.whole.tokens, self.pending]
        prompt, turn = np.concatenate(so_far), len(self.turns)
        seed, sampling = self.origin.seed, self.origin.sampling
        if turn:
            words = np.random.SeedSequence((seed & 2**64 - 1, self.sample, turn)).generate_state(1, np.uint64)
            seed = int(words[0])
        room = self.limits.tokens - len(prompt)
        sampling = replace(sampling, n=1, max_tokens=min(sampling.max_tokens, room))
        return Request(prompt=prompt, sampling=sampling, seed=seed)

    def take(self, turn: Completion) -> None:
        """Add a turn, with the context it was drawn after. One without a token changes nothing."""
        if len(turn.tokens):
            self.whole = turn if self.whole is None else joined(self.whole, self.pending, turn)
            self.turns.append((len(self.whole.tokens) - len(turn.tokens), len(self.whole.tokens)))
            self.messages.append({"role": "assistant", "content": turn.text})
            self.rewards.append(None)
        match turn.finish:
            case "abort":
                self._end("failed", "the engine gave the turn up")
            case "length":
                self._end("tokens")
            case _ if not len(turn.tokens):
                self._end("failed", "the engine drew no token")

    def answer(self) -> None:
        """Let the environment answer the turn just taken, and end the episode or make its next prompt."""
        if self.ended is not None or self.whole is None:
            return
        step = self._ask(self.environment.step, self.whole.text)
        if step is None:
            return
        self.rewards[-1] = step.reward
        if step.done:
            return self._end("done")
        if len(self.turns) >= self.limits.turns:
            return self._end("turns")
        observation = [readable(self.tokenizer, m, self.limits.observation_chars) for m in step.observation]
        last = int(self.whole.tokens[-1])
        self.pending = between_turns(self.tokenizer, self.messages[:-1], last, observation, self.tools)
        if sum(map(len, (self.prompt, self.whole.tokens, self.pending))) + self._least() > self.limits.tokens:
            return self._end("tokens")
        self.messages += observation

    def episode(self) -> Episode:
        assert self.ended is not None
        finish: Literal["stop", "length", "abort"] = "length"
        if self.ended in ("done", "failed"):
            finish = "stop" if self.ended == "done" else "abort"
        earned = [r for r in self.rewards if r is not None]
        whole = self.whole or nothing(self.prompt)
        return Episode(
            completion=replace(
                whole, finish=finish, prompt_tokens=self.prompt, reward=sum(earned) if earned else None,
                detail=f"environment: {self.detail}" if finish == "abort" else "",
            ),
            messages=tuple(self.messages),
            turns=tuple(self.turns),
            rewards=tuple(self.rewards),
            ended=self.ended,
            detail=self.detail,
            seconds=self.seconds,
        )

    def _ask(self, call: Callable[..., R], argument: object) -> R | None:
        """What the environment says within the time that is left; None where the episode ended instead."""
        start = time.monotonic()
        try:
            return within(self.limits.seconds - self.seconds, call, argument)
        except TimeoutError as error:
            ours = self.seconds + time.monotonic() - start >= self.limits.seconds  # or of somebody it waited for
            detail = f"the environment took more than {self.limits.seconds:g} s" if ours else f"TimeoutError: {error}"
            self._end("seconds" if ours and self.turns else "failed", detail)  # no turn: the policy had no part in it
        except MachineError as error:
            self._end("failed", " ".join(str(error).split()))
        finally:
            self.seconds += time.monotonic() - start
        return None

    def _least(self) -> int:
        """Tokens the shortest turn needs."""
        thinking = self.origin.sampling.thinking
        return 1 if thinking is None else thinking.max_tokens + TAG_TOKENS

    def _end(self, ended: Ended, detail: str = "") -> None:
        self.ended, self.detail = ended, detail


def within(seconds: float, call: Callable[..., R], *args: object) -> R:
    """`call(*args)`, waited for no longer than `seconds`. Raises TimeoutError, and what the call raises.

    Python cannot end a thread: a call that is late goes on in a daemon thread whose result nobody reads.
    """
    if seconds <= 0:
        raise TimeoutError("no time left")
    box: queue.SimpleQueue[tuple[R | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            box.put((call(*args), None))
        except BaseException as error:  # handed over, and raised where somebody waits
            box.put((None, error))

    threading.Thread(target=run, daemon=True, name="within").start()
    try:
        value, error = box.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"not done within {seconds:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]  # an R where there was no error
