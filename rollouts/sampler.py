"""The sampler's host side: a queue of requests, slots that are refilled as soon as they are free, completions.

    sampler = Sampler(model, params, tokenizer, SlotConfig(slots=8, length=512))
    sampler.submit(request)
    while sampler.busy:
        for finished in sampler.step(): ...

A prompt is read once, all but its last token, into the prefix buffer; each of its samples copies that into a slot and
starts from the last token. So the first sampled token comes from the same program as all others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from cabochon import heap
from cabochon.model.config import ModelConfig
from cabochon.rollouts import prefix, thinking
from cabochon.rollouts.engine_params import EngineParams, engine_params
from cabochon.rollouts.filters import Knobs
from cabochon.rollouts.programs import Programs, Steps, programs
from cabochon.rollouts.prompts import Prepared, pieces, prepare, stopped, text_of
from cabochon.rollouts.slots import SlotConfig, empty_prefix, empty_slots, make_knobs, make_row, seed_words
from cabochon.tokenizer import Tokenizer
from cabochon.types import Completion, Request, Timings

_TOGETHER = 8
"""Samples of one prompt that one call of a program puts in their slots."""


class SamplerError(ArithmeticError):
    """The policy's probabilities are not finite: its weights are, or became, unusable."""


class Finished(NamedTuple):
    """One sample of a submitted request."""

    ticket: int
    sample: int
    completion: Completion


Watch = Callable[[int, int, np.ndarray], None]
"""Called after each dispatch with (ticket, sample, all its tokens so far): for streaming."""


@dataclass(kw_only=True)
class _Job:
    """A request in the queue."""

    ticket: int
    work: Prepared
    knobs: Knobs
    submitted: float
    started: int = 0
    """samples that have a slot or are done"""
    read: bool = False
    """its prompt is in the prefix buffer"""
    from_slot: int | None = None
    """where a part of its prompt came from"""
    prefill_seconds: float = 0.0
    routes: np.ndarray | None = None
    """[P-1, L, C] of the last reading"""


@dataclass(kw_only=True)
class _Running:
    """A sample in a slot, and what it drew so far, a piece per dispatch."""

    job: _Job
    sample: int
    phase: int
    """of thinking, after the prompt"""
    since: float
    loads: int
    """how often weights had been loaded when it began"""
    prompt_routes: np.ndarray | None
    """[P-1, L, C] of its prompt as it was read then; new weights have the job read again for samples that wait"""
    tokens: list[int] = field(default_factory=list)
    logp: list[np.ndarray] = field(default_factory=list)
    raw: list[np.ndarray] = field(default_factory=list)
    sampled: list[np.ndarray] = field(default_factory=list)
    phases: list[np.ndarray] = field(default_factory=list)
    routes: list[np.ndarray] = field(default_factory=list)
    versions: list[np.ndarray] = field(default_factory=list)


@dataclass(kw_only=True)
class Counters:
    """What the sampler did, for reports."""

    dispatches: int = 0
    steps: int = 0
    """decode steps, each one token for every live slot"""
    new_tokens: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    """read by prefill; the last token of a prompt is read by decode"""
    reused_tokens: int = 0
    """of prompts, whose keys and values an earlier sequence had left"""


class Sampler:
    """One policy on one device. Not thread-safe."""

    def __init__(
        self, model: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer, cfg: SlotConfig, version: int = 0
    ):
        heap.fit(params)
        self.model, self.tokenizer, self.cfg = model, tokenizer, cfg
        self.counters = Counters()
        self._programs: Programs = programs(model, cfg)
        self._slots, self._prefix = empty_slots(model, cfg), empty_prefix(model, cfg)
        self._queue: deque[_Job] = deque()
        self._running: dict[int, _Running] = {}
        self._stopped = np.zeros(cfg.slots, bool)
        self._kept: dict[int, prefix.Kept] = {}
        self._tickets = self._ended = self._loads = 0
        self.load(params, version)

    def load(self, params: Mapping[str, Any], version: int) -> None:
        """Use these weights from the next token on.

        A running sequence keeps the keys and values it has, as in-flight updates do; its later tokens carry the new
        version. A prompt that waits is read again, and nothing that older weights computed is reused.
        """
        self._use(engine_params(self.model, params, self.cfg), version)

    def take_over(self, other: Sampler) -> None:
        """`load` what another sampler of the same shape has loaded: at once, since nothing is prepared again."""
        self._use(other._params, other.version)

    def _use(self, params: EngineParams, version: int) -> None:
        self._params, self.version = params, version
        self._loads += 1
        self._kept.clear()
        for job in self._queue:
            job.read = False

    def prepare(self, request: Request, where: str = "request", draw: bool = True) -> Prepared:
        """Check a request without running it; without `draw` it is for a Scorer. Raises UserError."""
        return prepare(self.model, self.tokenizer, self.cfg, request, where, draw)

    def submit(self, work: Prepared) -> int:
        """Queue it; its samples come out of `step` under the ticket returned."""
        knobs = make_knobs(work.sampling, self.model.vocab_size)  # may raise: no request is in the queue that did
        self._tickets += 1
        self._queue.append(_Job(ticket=self._tickets, work=work, knobs=knobs, submitted=time.monotonic()))
        return self._tickets

    def abort(self, tickets: Collection[int]) -> int:
        """Drop what is left of these requests, running or waiting. Returns how many samples that were."""
        waiting = sum(job.work.sampling.n - job.started for job in self._queue if job.ticket in tickets)
        self._queue = deque(job for job in self._queue if job.ticket not in tickets)
        slots = [slot for slot, run in self._running.items() if run.job.ticket in tickets]
        for slot in slots:
            self._keep(slot, self._running.pop(slot))
            self._stopped[slot] = True
        return waiting + len(slots)

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._running)

    @property
    def params(self) -> EngineParams:
        """The engine's own copy of the weights."""
        return self._params

    @property
    def compiled(self) -> dict[str, int]:
        """How often each program was traced in this process, all samplers of this shape together."""
        return dict(self._programs.traces)

    def step(self, watch: Watch | None = None) -> list[Finished]:
        """Fill free slots, decode one dispatch, return what finished. Raises SamplerError for non-finite log-probs."""
        self._fill()
        if not self._running:
            return []
        waiting = np.bool_(bool(self._queue))
        self._slots, steps = self._programs.decode(self._params, self._slots, self._stopped, waiting)
        self._stopped = np.zeros(self.cfg.slots, bool)
        drawn = jax.device_get(steps)
        self.counters.dispatches += 1
        self.counters.steps += int(drawn.taken)
        out = []
        for slot, run in sorted(self._running.items()):
            done = self._take(slot, run, drawn)
            if watch is not None:
                watch(run.job.ticket, run.sample, np.array(run.tokens, np.int32))
            if done is not None:
                out.append(Finished(run.job.ticket, run.sample, done))
                self._keep(slot, self._running.pop(slot))
        return out

    # -- starting ------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        free = [slot for slot in range(self.cfg.slots) if slot not in self._running]
        while free and self._queue:
            job = self._queue[0]
            if not job.read:
                self._read(job)
            free.sort(key=lambda slot: self._worth(slot, job))
            count = min(len(free), job.work.sampling.n - job.started, _TOGETHER)
            self._begin(job, free[:count])
            del free[:count]
            if job.started == job.work.sampling.n:
                self._queue.popleft()

    def _worth(self, slot: int, job: _Job) -> tuple[int, int]:
        """A free slot's rank to be taken: where the prompt came from, then those that hold nothing, then the oldest."""
        if slot == job.from_slot:
            return 0, 0
        return (2, self._kept[slot].since) if slot in self._kept else (1, slot)

    def _read(self, job: _Job) -> None:
        """Prompt, all but the last token, into the prefix buffer: what a slot holds from there, the rest by chunks."""
        begin, parts = time.monotonic(), []
        tokens, routes = job.work.tokens[:-1], job.work.sampling.routes
        at, job.from_slot = 0, None
        if self.cfg.reuse and (found := prefix.longest(self._kept, tokens, self.cfg.reuse, routes)):
            job.from_slot, at = found
            self._prefix = self._programs.recall(self._prefix, self._slots, np.int32(job.from_slot))
            kept = self._kept[job.from_slot].routes_TLC
            parts += [kept[:at]] if routes and kept is not None else []
        self.counters.prompts += 1
        self.counters.reused_tokens += at
        self.counters.prompt_tokens += len(tokens) - at
        for real, chunk in pieces(len(tokens) - at, self.cfg.chunks):
            padded = np.zeros(chunk, np.int32)
            padded[:real] = tokens[at : at + real]
            self._prefix, used = self._programs.prefill(
                self._params, self._prefix, padded, np.int32(at), np.int32(real)
            )
            if routes:
                parts.append(np.asarray(used)[:real])
            at += real
        jax.block_until_ready(self._prefix)  # so that the time is the work's and not that of asking for it
        job.routes = np.concatenate(parts) if parts else None
        job.read, job.prefill_seconds = True, time.monotonic() - begin

    def _begin(self, job: _Job, slots: list[int]) -> None:
        """The job's next samples, one in each of these slots, at most _TOGETHER."""
        work, s = job.work, job.work.sampling
        if s.thinking is not None and work.tags is not None:
            thought = thinking.initial(self.tokenizer, s.thinking, work.tags, work.tokens)
        else:
            thought = thinking.idle()
        row = make_row(
            token=int(work.tokens[-1]),
            position=len(work.tokens) - 1,
            left=s.max_tokens,
            key=seed_words(work.seed),
            stop_ids=work.stop_ids,
            knobs=job.knobs,
            thought=thought,
        )
        slot_N = np.full(_TOGETHER, self.cfg.slots, np.int32)
        slot_N[: len(slots)] = slots
        self._slots = self._programs.start(
            self._slots, self._prefix, slot_N, np.int32(len(slots)), row, np.int32(job.started)
        )
        phase, now = int(np.asarray(thought.phase_B)), time.monotonic()
        for slot in slots:
            self._stopped[slot] = False
            self._kept.pop(slot, None)
            self._running[slot] = _Running(
                job=job, sample=job.started, phase=phase, since=now, loads=self._loads, prompt_routes=job.routes,
            )  # fmt: skip
            job.started += 1

    def _keep(self, slot: int, run: _Running) -> None:
        """Note what an ended sequence leaves in its slot, where one set of weights computed all of it."""
        if not self.cfg.reuse or run.loads != self._loads:
            return
        steps = [run.prompt_routes] if run.prompt_routes is not None else []
        tokens = np.concatenate([run.job.work.tokens, np.array(run.tokens, np.int32)])[:-1]
        routes = np.concatenate(steps + run.routes)[: len(tokens)] if run.routes else None
        self._ended += 1
        self._kept[slot] = prefix.Kept(tokens_T=tokens, routes_TLC=routes, since=self._ended)

    # -- ending --------------------------------------------------------------------------------------------------------

    def _take(self, slot: int, run: _Running, drawn: Steps) -> Completion | None:
        """Add what one slot drew; its completion where it has ended."""
        s = run.job.work.sampling
        n = int(drawn.live_NB[:, slot].sum())  # a slot is live in the first n steps of a dispatch
        if not (np.isfinite(drawn.logp_NB[:n, slot]).all() and np.isfinite(drawn.raw_NB[:n, slot]).all()):
            raise SamplerError(f"weights of version {self.version} give log-probs that are not finite")
        checked = len(run.tokens)
        run.tokens += drawn.token_NB[:n, slot].tolist()
        run.logp.append(np.asarray(drawn.logp_NB[:n, slot]))
        run.raw.append(np.asarray(drawn.raw_NB[:n, slot]))
        run.sampled.append(np.asarray(drawn.sampled_NB[:n, slot]))
        run.phases.append(np.asarray(drawn.phase_NB[:n, slot]))
        run.versions.append(np.full(n, self.version, np.int32))
        if s.routes:
            run.routes.append(np.asarray(drawn.routes_NBLC[:n, slot]))
        self.counters.new_tokens += n
        last_sampled = bool(drawn.sampled_NB[n - 1, slot]) if n else False
        by_id = last_sampled and run.tokens[-1] in run.job.work.stop_ids
        ended = by_id or len(run.tokens) == s.max_tokens
        kept = stopped(self.tokenizer, run.tokens, checked, s.stop) if s.stop else None
        if kept is not None:
            self._stopped[slot] = not ended
            return self._completion(run, kept, by_string=True, by_id=by_id and kept == len(run.tokens))
        return self._completion(run, len(run.tokens), by_string=False, by_id=by_id) if ended else None

    def _completion(self, run: _Running, kept: int, by_string: bool, by_id: bool) -> Completion:
        job, now = run.job, time.monotonic()
        s, tokens = job.work.sampling, np.array(run.tokens[:kept], np.int32)
        routes = prompt_routes = None
        if s.routes:
            # step i ran the token before the one it drew: the first, the prompt's last
            steps = np.concatenate(run.routes)
            last = np.full((1, *steps.shape[1:]), -1, np.int32)
            routes = np.concatenate([steps[1:kept], last])
            prompt_routes = np.concatenate([*([] if run.prompt_routes is None else [run.prompt_routes]), steps[:1]])
        phases = np.concatenate(run.phases)[:kept]
        thought, answer = thinking.spans(job.work.tags, run.phase, phases, tokens)
        return Completion(
            tokens=tokens,
            logprobs=np.concatenate(run.logp)[:kept],
            raw_logprobs=np.concatenate(run.raw)[:kept],
            mask=np.concatenate(run.sampled)[:kept],
            text=text_of(self.tokenizer, run.tokens[: kept - by_id], s.stop),
            finish="stop" if by_string or by_id else "length",
            policy_version=np.concatenate(run.versions)[:kept],
            routes=routes,
            prompt_tokens=job.work.tokens,
            prompt_routes=prompt_routes,
            thinking=thought,
            answer=answer,
            timings=Timings(
                queued=run.since - job.submitted, prefill=job.prefill_seconds, decode=now - run.since
            ),
        )
