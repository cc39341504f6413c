"""`cabochon data check`: what is in the data before a run spends time on it. Pure: text in, lines out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cabochon.data import Example, prompt_key, read_examples, split_held_out
from cabochon.sft.config import SftConfig
from cabochon.sft.data import Encoded, Split, encode, encode_split, pack
from cabochon.tokenizer import Tokenizer

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

    sources: tuple[tuple[str, int], ...]
    """(path, examples)"""
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


def check(cfg: SftConfig, tokenizer: Tokenizer, *, rows: int = 3) -> Report:
    """Read and encode everything the recipe names. Raises UserError for a row that cannot be read; one that is too
    long or has nothing to learn is a finding."""
    limit = cfg.step.sequence_length
    sources = read_examples(cfg.data.train, cfg.data.columns, chat=cfg.data.chat)
    held = [e for source in read_examples(cfg.data.eval, cfg.data.columns, chat=cfg.data.chat) for e in source]
    examples = [e for source in sources for e in source]
    if cfg.data.eval_fraction:
        kept, out = split_held_out(examples, cfg.data.eval_fraction)
        examples, held = [examples[i] for i in kept], held + [examples[i] for i in out]
    encoded = [encode(e, tokenizer, train_on=cfg.data.train_on) for e in examples]
    lenient = cfg.data.model_copy(
        update={"empty": "drop", "too_long": "drop" if cfg.data.too_long == "error" else cfg.data.too_long}
    )
    split = encode_split([examples], [1.0], tokenizer, lenient, limit)
    return Report(
        sources=tuple((s.path, len(found)) for s, found in zip(cfg.data.train, sources, strict=True)),
        lengths=np.array([len(e.ids) for e in encoded]),
        trained=split.counts.trained_tokens,
        limit=limit,
        fill_packed=_fill(split, limit, packing=True),
        fill_padded=_fill(split, limit, packing=False),
        findings=tuple(_findings(encoded, examples, limit, cfg.data.too_long)),
        leaks=tuple(_leaks(examples, held)),
        sample=tuple(encoded[i] for i in np.random.default_rng(cfg.seed).permutation(len(encoded))[:rows]),
    )


def _fill(split: Split, limit: int, *, packing: bool) -> float:
    rows = pack(split, np.arange(len(split.examples)), limit, packing)
    return split.counts.tokens / max(1, len(rows) * limit)


def _findings(encoded: Sequence[Encoded], examples: Sequence[Example], limit: int, policy: str) -> Iterator[Finding]:
    done = {"error": "refused", "drop": "left out", "left": "cut at the left", "right": "cut at the right"}[policy]
    if long := tuple(e.where for e in encoded if len(e.ids) > limit):
        yield Finding(what=f"longer than {limit} tokens ({done}, data.too_long={policy})", places=long)
    if empty := tuple(e.where for e in encoded if not e.mask.any()):
        yield Finding(what="without a token to learn", places=empty)
    whole: dict[bytes, str] = {}
    copies = []
    for e in encoded:
        first = whole.setdefault(e.ids.tobytes() + e.mask.tobytes(), e.where)
        if first is not e.where:
            copies.append(f"{e.where} = {first}")
    if copies:
        yield Finding(what="exact copies", places=tuple(copies))
    prompts = Counter(prompt_key(e) for e in examples)
    if again := sum(n - 1 for n in prompts.values()) - len(copies):
        yield Finding(what="share a prompt with another but not its completion", places=("see prompts",) * again)


def _leaks(examples: Sequence[Example], held: Sequence[Example]) -> Iterator[Finding]:
    trained = {prompt_key(e): e.where for e in reversed(examples)}
    if both := tuple(f"{e.where} = {trained[key]}" for e in held if (key := prompt_key(e)) in trained):
        yield Finding(what="held-out prompts are among the trained ones", places=both)


def as_lines(report: Report) -> list[str]:
    """For people; the sample is printed by `marked`."""
    n, tokens = len(report.lengths), int(report.lengths.sum())
    lines = [f"{path}: {count:,} examples" for path, count in report.sources]
    lines += [f"{n:,} examples to train on, {tokens:,} tokens, {report.trained:,} with loss", "", "length in tokens"]
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
