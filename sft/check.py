"""`cabochon data check`: what is in the data before a run spends time on it. Pure: text in, lines out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cabochon.config import SourceConfig
from cabochon.data import Chat, Example, Plain, prompt_key, read_examples, split_held_out
from cabochon.errors import UserError
from cabochon.sft.config import ExamplesConfig
from cabochon.sft.data import Encoded, Split, encode, encode_split, pack
from cabochon.tokenizer import Tokenizer
from cabochon.types import Task

BARS = 10
"""of the histogram"""
NAMED = 3
"""places that are named for each finding"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that a person should look at."""

    what: str
    places: tuple[str, ...]

    @property
    def line(self) -> str:
        more = f" and {len(self.places) - NAMED} more" if len(self.places) > NAMED else ""
        return f"{len(self.places):,} {self.what}: {', '.join(self.places[:NAMED])}{more}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """What `check` found. `leaks` are the findings that make an evaluation worthless."""

    sources: tuple[tuple[SourceConfig, int], ...]
    """with the examples in each"""
    held: int
    """held-out examples"""
    lengths: np.ndarray
    """[n] tokens of each example as it was written, before anything is cut"""
    trained: int
    """tokens with loss"""
    limit: int
    fill_packed: float
    """share of packed rows that is tokens"""
    fill_padded: float
    """the same with one example a row"""
    findings: tuple[Finding, ...]
    leaks: tuple[Finding, ...]
    sample: tuple[Encoded, ...]


def check(cfg: ExamplesConfig, tokenizer: Tokenizer, *, tasks: Sequence[Task] = (), rows: int = 3) -> Report:
    """Read and encode everything the recipe names. `tasks`: those of `eval.sampled`, whose prompts must not be trained
    on either. Raises UserError for a row that cannot be read, and where none is left to train on; one that is too long
    or has nothing to learn is a finding."""
    limit = cfg.step.sequence_length
    sources = read_examples(cfg.data.train, cfg.data.columns, chat=cfg.data.chat)
    held = [e for source in read_examples(cfg.data.eval, cfg.data.columns, chat=cfg.data.chat) for e in source]
    examples = [e for source in sources for e in source]
    if cfg.data.eval_fraction:
        kept, out = split_held_out(examples, cfg.data.eval_fraction)
        examples, held = [examples[i] for i in kept], held + [examples[i] for i in out]
    if not examples:
        raise UserError(f"data.eval_fraction={cfg.data.eval_fraction}: every row is held out, none is left to train on")
    encoded, out_of = ([encode(e, tokenizer, train_on=cfg.data.train_on) for e in some] for some in (examples, held))
    lenient = cfg.data.model_copy(
        update={"empty": "drop", "too_long": "drop" if cfg.data.too_long == "error" else cfg.data.too_long}
    )
    split = encode_split([examples], [1.0], tokenizer, lenient, limit)
    return Report(
        sources=tuple((s, len(found)) for s, found in zip(cfg.data.train, sources, strict=True)),
        held=len(held),
        lengths=np.array([len(e.ids) for e in encoded]),
        trained=split.counts.trained_tokens,
        limit=limit,
        fill_packed=_fill(split, limit, packing=True),
        fill_padded=_fill(split, limit, packing=False),
        findings=(
            *_findings(encoded, limit, cfg.data.too_long),
            *_repeats(encoded, examples),
            *_findings(out_of, limit, cfg.data.too_long, "held-out examples "),
        ),
        leaks=tuple(_leaks(examples, held, tasks)),
        sample=tuple(encoded[i] for i in np.random.default_rng(cfg.seed).permutation(len(encoded))[:rows]),
    )


def _fill(split: Split, limit: int, *, packing: bool) -> float:
    rows = pack(split, np.arange(len(split.examples)), limit, packing)
    return split.counts.tokens / max(1, len(rows) * limit)


def _findings(encoded: Sequence[Encoded], limit: int, policy: str, which: str = "") -> Iterator[Finding]:
    """What a run would refuse, leave out or cut."""
    done = {"error": "refused", "drop": "left out", "left": "cut at the left", "right": "cut at the right"}[policy]
    if long := tuple(e.where for e in encoded if len(e.ids) > limit):
        yield Finding(what=f"{which}longer than {limit} tokens ({done}, data.too_long={policy})", places=long)
    if empty := tuple(e.where for e in encoded if not e.mask.any()):
        yield Finding(what=f"{which}without a token to learn", places=empty)


def _repeats(encoded: Sequence[Encoded], examples: Sequence[Example]) -> Iterator[Finding]:
    """Examples that are copies, and those that share their prompt alone."""
    whole: dict[bytes, str] = {}
    prompts: dict[str, str] = {}
    copies, shared = [], []
    for e, example in zip(encoded, examples, strict=True):
        first = whole.setdefault(e.ids.tobytes() + e.mask.tobytes(), e.where)
        same = prompts.setdefault(prompt_key(example), e.where)
        if first is not e.where:
            copies.append(f"{e.where} = {first}")
        elif same is not e.where:
            shared.append(f"{e.where} = {same}")
    if copies:
        yield Finding(what="exact copies", places=tuple(copies))
    if shared:
        yield Finding(what="share a prompt with another but not its completion", places=tuple(shared))


def _leaks(examples: Sequence[Example], held: Sequence[Example], tasks: Sequence[Task]) -> Iterator[Finding]:
    trained = {prompt_key(e): e.where for e in reversed(examples)}
    if both := tuple(f"{e.where} = {trained[key]}" for e in held if (key := prompt_key(e)) in trained):
        yield Finding(what="held-out prompts are among the trained ones", places=both)
    asked = ((t.id, trained[key]) for t in tasks for key in _keys_of(t) if key in trained)
    if both := tuple(f"{task} = {where}" for task, where in asked):
        yield Finding(what="tasks of eval.sampled are among the trained prompts", places=both)


def _keys_of(task: Task) -> set[str]:
    """A task's prompt that is text may have been trained on as text, or as a user's turn."""
    if not isinstance(task.prompt, str):
        return {prompt_key(Chat(where="", messages=tuple(task.prompt)))}
    turn = Chat(where="", messages=({"role": "user", "content": task.prompt},))
    return {prompt_key(Plain(where="", prompt=task.prompt, completion="")), prompt_key(turn)}


def as_lines(report: Report) -> list[str]:
    """For people; the sample is printed by `marked`."""
    n, tokens = len(report.lengths), int(report.lengths.sum())
    lines = [f"{source.path}: {count:,} examples" + (f", weight {source.weight:g}" if source.weight != 1 else "")
             for source, count in report.sources]  # fmt: skip
    lines += [f"{n:,} examples to train on ({report.held:,} held out), {tokens:,} tokens, {report.trained:,} with loss"]
    lines += ["", "length in tokens"]
    lines += histogram(report.lengths)
    full = f"{report.fill_packed:.1%} full packed, {report.fill_padded:.1%} padded"
    lines += ["", f"rows of {report.limit} tokens: {full}"]
    lines += [f"! {finding.line}" for finding in report.findings]
    lines += [f"LEAK {leak.line}" for leak in report.leaks]
    return lines + ([] if report.leaks or report.findings else ["nothing to complain about"])


def histogram(lengths: np.ndarray) -> list[str]:
    """A bar per tenth of the range."""
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, BARS + 1).astype(int))
    counts, _ = np.histogram(lengths, edges)
    width = len(str(edges[-1]))
    return [
        f"{a:>{width}}-{b - 1:<{width}} {'█' * round(40 * c / counts.max()):40} {c:,}"
        for a, b, c in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def marked(encoded: Encoded, tokenizer: Tokenizer, *, on: str, off: str) -> str:
    """The example's text with its trained tokens between `on` and `off`."""
    out, start = [], 0
    edges = [*(np.flatnonzero(np.diff(encoded.mask.astype(int))) + 1).tolist(), len(encoded.ids)]
    for end in edges:
        text = tokenizer.decode(encoded.ids[start:end])
        out.append(f"{on}{text}{off}" if encoded.mask[start] else text)
        start = end
    return "".join(out)
