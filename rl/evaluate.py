"""Answers of a policy to held-out tasks, and what they say about it. Beside `rl/train.py` the only file of `rl` that
knows other rooms; `cabochon eval` and the evaluations of a run come here."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cabochon.chat import as_turns
from cabochon.errors import UserError
from cabochon.files import write_whole
from cabochon.metrics import plain
from cabochon.model.address import open_language_model
from cabochon.protocols import PolicyEngine, Weights
from cabochon.rl.estimators import cot_verdicts, majority_at_k, over_problems, paired_test, pass_at_k
from cabochon.rollouts.local import LocalEngine, requests_for
from cabochon.rollouts.prompts import encode_prompt
from cabochon.rollouts.slots import SlotConfig
from cabochon.types import Completion, Sampling, Score, Task, Thinking, Verdict
from cabochon.verifiers.build import SandboxName, probes_for, verifier_for
from cabochon.verifiers.pool import VerifierPool
from cabochon.verifiers.tasks import read_tasks

T = TypeVar("T")

COUNTED = ("any", "majority", "all")
"""how a judge's several votes on the reasoning of one answer are counted"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Answered:
    """n answers to one task."""

    task: Task
    score_n: np.ndarray
    """[n] in [0, 1], NaN where the machine failed"""
    tokens_n: np.ndarray
    """[n] sampled tokens"""
    truncated_n: np.ndarray
    """[n] bool: cut off at the limit"""
    texts: list[str]
    answers: list[str | None]
    """what the verifier took for the answer, None where there was none"""
    sound_n: Mapping[str, np.ndarray] = field(default_factory=dict)
    """[n] by how the judge's votes are counted (any, majority, all): 1 where answer and reasoning are right, else 0,
    NaN where that is not known; empty where no judge was asked"""


def answer(
    engine: PolicyEngine,
    verifiers: VerifierPool,
    tasks: Sequence[Task],
    sampling: Sampling,
    seed: int,
    *,
    chat: bool = False,
) -> list[Answered]:
    """`sampling.n` answers to each task, judged. The same seed asks the same, whatever else the engine does. `chat`: a
    prompt that is text goes through the chat template."""
    n = sampling.n
    requests = requests_for([as_turns(task.prompt, chat) for task in tasks], sampling, seed)
    completions = engine.generate([replace(r, task=t) for r, t in zip(requests, tasks, strict=True)])
    verdicts = verifiers.verify([task for task in tasks for _ in range(n)], [c.text for c in completions])
    out = []
    for i, task in enumerate(tasks):
        some, said = completions[i * n : (i + 1) * n], verdicts[i * n : (i + 1) * n]
        found = [v.evidence.get("value", v.evidence.get("answer")) for v in said]
        out.append(
            Answered(
                task=task,
                score_n=np.array([_score(c, v) for c, v in zip(some, said, strict=True)]),
                tokens_n=np.array([int(c.mask.sum()) for c in some]),
                truncated_n=np.array([c.finish == "length" for c in some]),
                texts=[c.text for c in some],
                answers=[None if f is None else str(f) for f in found],
            )
        )
    return out


def _score(completion: Completion, verdict: Verdict) -> float:
    """What the environment paid where the verifier abstains; NaN where the machine failed, in drawing or in judging."""
    if completion.finish == "abort" or verdict.status == "infra_error":
        return np.nan
    paid = completion.reward if verdict.score is None else verdict.score
    return np.nan if paid is None else paid


JudgeTexts = Callable[[Sequence[Task], Sequence[str]], Sequence[Score]]
"""A judge of reasoning: a score for each response to its task, with the votes it is of in its evidence."""


def reasoned(answered: Sequence[Answered], judge: JudgeTexts) -> list[Answered]:
    """With the judge's opinion of the reasoning behind every right answer (a wrong one needs none)."""
    right = [(i, j) for i, a in enumerate(answered) for j in np.flatnonzero(a.score_n == 1)]
    scores = judge([answered[i].task for i, _ in right], [answered[i].texts[j] for i, j in right])
    sound = [{how: np.where(np.isnan(a.score_n), np.nan, 0.0) for how in COUNTED} for a in answered]
    for (i, j), score in zip(right, scores, strict=True):
        votes = [vote > 0.5 for vote in score.evidence.get("votes", ()) if vote is not None]
        unread = score.value is None or not votes
        for how, yes in cot_verdicts(votes).items():
            sound[i][how][j] = np.nan if unread else float(yes)
    return [replace(a, sound_n=each) for a, each in zip(answered, sound, strict=True)]


def distinct(paths: Sequence[str], where: str) -> list[Task]:
    """The tasks of all files. Raises UserError, which names `where` they were given, for an id that is used twice."""
    tasks: dict[str, Task] = {}
    for task in (t for path in paths for t in read_tasks(path)):
        if task.id in tasks:
            raise UserError(f"{where}: the id {task.id!r} is in two of the files; make ids different")
        tasks[task.id] = task
    return list(tasks.values())


def first_of_each(tasks: Sequence[Task], most: int) -> list[Task]:
    """At most `most` tasks, the first of every domain alike, in their order."""
    domains: dict[str, list[int]] = {}
    for i, task in enumerate(tasks):
        domains.setdefault(task.domain, []).append(i)
    ranked = sorted((rank, i) for members in domains.values() for rank, i in enumerate(members))
    return [tasks[i] for i in sorted(i for _, i in ranked[:most])]


def by_domain(answered: Sequence[Answered]) -> dict[str, list[Answered]]:
    """`all` first, then the domains in order of appearance; `all` alone where there is only one."""
    domains = _grouped(answered, [a.task.domain for a in answered])
    return {"all": list(answered), **(domains if len(domains) > 1 else {})}


def _grouped(items: Sequence[T], domains: Sequence[str]) -> dict[str, list[T]]:
    """A domain that is called `all`, as a file of tasks may be, is told apart from all of them."""
    out: dict[str, list[T]] = {}
    for item, domain in zip(items, domains, strict=True):
        out.setdefault("all (the domain)" if domain == "all" else domain, []).append(item)
    return out


def accuracies(answered: Sequence[Answered]) -> dict[str, float]:
    """Mean score of all answers, each task counting once, over everything and by domain."""
    out = {}
    for domain, group in by_domain(answered).items():
        means = [np.nanmean(a.score_n) for a in group if not np.isnan(a.score_n).all()]
        out[domain] = float(np.mean(means)) if means else float("nan")
    return out


# -- whole evaluations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What every model is asked, alike."""

    tasks: tuple[str, ...]
    chat: bool = False
    """prompts that are text go through the chat template"""
    most: int = 1000
    samples: int = 4
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    thinking: tuple[int, ...] = ()
    """budgets, each an evaluation of its own; none: no budget"""
    slots: int = 32
    seed: int = 0
    sandbox: SandboxName = "bubblewrap"
    judge: str = ""
    """who judged the reasoning; empty where nobody did"""


def compare(
    models: Sequence[str], asked: Asked, told: Callable[[str], None], judge: JudgeTexts | None = None
) -> dict[str, Any]:
    """Every model (and thinking budget) on the same tasks with the same seeds; the others are set against the first.
    With a `judge` of reasoning also CoT-Pass@K.

    Raises UserError for tasks or models that cannot be had, and where pass@k of a greedy decoder would be asked for.
    """
    if asked.temperature == 0 and asked.samples > 1:
        raise UserError(f"samples={asked.samples} at temperature 0 are all alike: ask for 1, or raise the temperature")
    tasks = first_of_each(distinct(asked.tasks, "--tasks"), asked.most)
    entries: list[dict[str, Any]] = []
    first: dict[str, Any] | None = None
    with VerifierPool(verifier=verifier_for(tasks, sandbox=asked.sandbox), probes=probes_for(tasks)) as verifiers:
        for model in models:
            config, params, tokenizer = open_language_model(model)
            longest = max(len(encode_prompt(tokenizer, as_turns(task.prompt, asked.chat))) for task in tasks)
            slots = SlotConfig(slots=asked.slots, length=longest + asked.max_tokens)
            engine = LocalEngine(config, tokenizer, Weights(version=0, params=params), slots)
            for budget in asked.thinking or (None,):
                begin = time.perf_counter()
                answered = answer(engine, verifiers, tasks, _sampling(asked, budget), asked.seed, chat=asked.chat)
                answered = answered if judge is None else reasoned(answered, judge)
                entry: dict[str, Any] = {"model": model, "thinking": budget, "seconds": time.perf_counter() - begin}
                entry |= {"domains": {d: summary(a) for d, a in by_domain(answered).items()}}
                entry |= {"problems": [_problem(a) for a in answered]}
                if first is not None:
                    entry["against_first"] = against(first, entry)
                first = first or entry
                entries.append(entry)
                told(f"{_name(entry)}: {len(tasks)} tasks x {asked.samples} in {entry['seconds']:.1f} s")
    return {"asked": {**asked.__dict__}, "evaluations": entries}


def _sampling(asked: Asked, budget: int | None) -> Sampling:
    think = None if budget is None else Thinking(max_tokens=budget)
    return Sampling(
        max_tokens=asked.max_tokens, temperature=asked.temperature, top_p=asked.top_p, n=asked.samples, thinking=think
    )


def summary(answered: Sequence[Answered]) -> dict[str, Any]:
    """avg@n with its 95 % interval (clustered by task), pass@k for k = 1, 2, 4 ... n, maj@k from 2 on, lengths,
    truncation.

    The mean takes parts of a score as they are; for pass@k and maj@k an answer is right where its score is 1. Samples
    that the machine failed (`lost`) are left out, and tasks with fewer than k that are left out of pass@k; a task that
    has none left is counted in `unjudged` alone.
    """
    known = [a for a in answered if not np.isnan(a.score_n).all()]
    lost = sum(int(np.isnan(a.score_n).sum()) for a in answered)
    out: dict[str, Any] = {"tasks": len(answered), "unjudged": len(answered) - len(known), "lost": lost}
    out["tokens"] = float(np.mean([a.tokens_n.mean() for a in answered]))
    out["truncated"] = float(np.mean([a.truncated_n.mean() for a in answered]))
    if not known:
        return out
    out["mean"] = over_problems([float(np.nanmean(a.score_n)) for a in known])._asdict()
    n = len(known[0].score_n)
    ks = [1 << i for i in range(n.bit_length()) if 1 << i <= n]
    for k in ks:
        right = {i: (a.score_n[~np.isnan(a.score_n)] == 1).tolist() for i, a in enumerate(known)}
        some = [i for i, each in right.items() if len(each) >= k]
        if some:
            out[f"pass@{k}"] = float(np.mean([pass_at_k(len(right[i]), sum(right[i]), k) for i in some]))
        if some and k > 1:
            out[f"maj@{k}"] = float(np.mean([majority_at_k(_classes(known[i]), right[i], k) for i in some]))
    return out | _cot([a for a in known if not np.isnan(a.score_n).any()], n, ks)


def _cot(whole: Sequence[Answered], n: int, ks: Sequence[int]) -> dict[str, Any]:
    """CoT-Pass@K (2506.14245), where reasoning was judged: pass@k of the answers whose reasoning is right too, by the
    majority of votes; `reasoning` has it by any and all votes, what share of right answers is soundly reasoned, and on
    how many tasks the judge could not be read (they are left out)."""
    read = [a for a in whole if a.sound_n and not np.isnan(a.sound_n["majority"]).any()]
    if not read:
        return {"reasoning": {"unread": len(whole)}} if any(a.sound_n for a in whole) else {}
    found = {how: {k: float(np.mean([pass_at_k(n, int(a.sound_n[how].sum()), k) for a in read])) for k in ks}
             for how in COUNTED}  # fmt: skip
    about = {"any": found["any"], "all": found["all"], "unread": len(whole) - len(read)}
    if right := sum(int((a.score_n == 1).sum()) for a in read):
        about["sound"] = sum(float(a.sound_n["majority"].sum()) for a in read) / right
    return {f"CoT-Pass@{k}": value for k, value in found["majority"].items()} | {"reasoning": about}


def _classes(a: Answered) -> list[Hashable | None]:
    """Of the samples that were judged: right answers are one class, whatever their form, wrong ones are told apart by
    what they say; by all of it, where the verifier names no answer in any of them."""
    named = any(answer is not None for answer in a.answers)
    told = a.answers if named else [text.strip() for text in a.texts]
    return [True if s == 1 else said for s, said in zip(a.score_n, told, strict=True) if not np.isnan(s)]


def against(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The mean difference on the tasks both were judged on, with its interval and p value, by domain."""
    before, after = ({p["task"]: p for p in e["problems"] if p["mean"] is not None} for e in (first, other))
    both = [t for t in before if t in after]
    domains = {"all": both, **_grouped(both, [before[t]["domain"] for t in both])}
    tested = {
        d: paired_test([before[t]["mean"] for t in ts], [after[t]["mean"] for t in ts])
        for d, ts in domains.items()
        if ts
    }
    return {d: p._asdict() for d, p in tested.items()}


def _problem(a: Answered) -> dict[str, Any]:
    mean = None if np.isnan(a.score_n).all() else float(np.nanmean(a.score_n))
    said = {"task": a.task.id, "domain": a.task.domain, "mean": mean, "scores": a.score_n, "answers": a.answers,
            "texts": a.texts, "tokens": a.tokens_n}  # fmt: skip
    return said | ({"sound": a.sound_n["majority"]} if a.sound_n else {})


def _name(entry: dict[str, Any]) -> str:
    return entry["model"] if entry["thinking"] is None else f"{entry['model']} (thinking {entry['thinking']})"


def as_table(report: dict[str, Any]) -> str:
    """A block per domain, a line per model."""
    entries = report["evaluations"]
    width = max(len(_name(e)) for e in entries)
    lines = []
    for domain in entries[0]["domains"]:
        some = entries[0]["domains"][domain]
        ks = [key for key in some if "@" in key]
        lines.append(f"{domain} ({some['tasks']} tasks)")
        named = "  ".join(f"{k:>{max(7, len(k))}}" for k in ks)
        lines.append(f"  {'':{width}}  {'mean':>6}  {'95 % interval':>15}  {named}"
                     f"  {'tokens':>6}  {'cut off':>7}  against the first")  # fmt: skip
        for e in entries:
            d = e["domains"][domain]
            if "mean" not in d:
                lines.append(f"  {_name(e):{width}}  no task could be judged")
                continue
            m, paired = d["mean"], e.get("against_first", {}).get(domain)
            difference = "" if paired is None else _told(paired)
            interval = f"{m['low']:.1%} - {m['high']:.1%}"
            lines.append(f"  {_name(e):{width}}  {m['mean']:6.1%}  {interval:>15}  "
                         + "  ".join(f"{d.get(k, float('nan')):{max(7, len(k))}.1%}" for k in ks)
                         + f"  {d['tokens']:6.1f}  {d['truncated']:7.1%}  {difference}")  # fmt: skip
        lost = {_name(e): x for e in entries if (x := e["domains"][domain]["lost"])}
        lines += [f"  {name}: {x} answers could not be judged and are left out" for name, x in lost.items()]
        unread = {_name(e): x for e in entries if (x := e["domains"][domain].get("reasoning", {}).get("unread"))}
        lines += [f"  {name}: the judge could not be read on {x} of the tasks with a right answer; CoT-Pass@K leaves "
                  "them out, and is too low" for name, x in unread.items()]  # fmt: skip
    return "\n".join(lines)


def _told(paired: dict[str, float]) -> str:
    known = math.isfinite(paired["low"])
    interval = f"[{_points(paired['low'])}, {_points(paired['high'])}]" if known else "(too few tasks for an interval)"
    return f"{_points(paired['difference'])} points {interval}, p {paired['p']:.3g}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def write(report: dict[str, Any], path: Path) -> None:
    """As JSON, whole or not at all. Raises MachineError."""
    write_whole(path, json.dumps(plain(report), ensure_ascii=False, indent=1) + "\n")
