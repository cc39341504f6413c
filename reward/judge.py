"""The generative reward model: a language model that reasons and gives a verdict, behind the Reward door.

`Judge` grades responses one by one against a rubric of one or more criteria; `PairwiseJudge` compares those of a group,
each pair in both orders. Either is handed an `Asker` and never changes: its id is a hash of everything that decides a
score, and each score carries it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, field_validator, model_validator

from cabochon.config import Frozen
from cabochon.errors import UserError
from cabochon.reward.answers import expected, swap_mean, weighted
from cabochon.reward.asking import Asker, Reading
from cabochon.reward.calibration import Platt, logit
from cabochon.reward.prompt import Template, prompt_text, untrusted, without_thinking
from cabochon.types import Rollout, Score, ScoreStatus, Task


class Criterion(Frozen):
    """One question with a closed set of answers."""

    text: str = "Is the response a correct answer to the task?"
    choices: tuple[str, ...] = Field(("No", "Yes"), min_length=2)
    """worst first: the i-th of n is worth i / (n - 1). Digits (1 to 5) give an expected score"""
    weight: float = Field(1.0, ge=0)

    @field_validator("choices")
    @classmethod
    def _distinct(cls, choices: tuple[str, ...]) -> tuple[str, ...]:
        plain = [choice.strip().casefold() for choice in choices]
        if "" in plain or len(set(plain)) < len(plain):
            raise ValueError(f"choices {list(choices)}: expected texts that differ in more than case and space")
        for (a, one), (b, two) in permutations(zip(plain, choices, strict=True), 2):
            if b.startswith(a):
                raise ValueError(f"choices: {one!r} begins {two!r}, so the first token of a verdict may be either's; "
                                 "expected texts of which none begins another (01 and 10, say)")  # fmt: skip
        return tuple(choice.strip() for choice in choices)


class PlattConfig(Frozen):
    """Calibration, as `cabochon rm eval` fits it on held-out judgements."""

    slope: float
    intercept: float = 0.0


class JudgeConfig(Frozen):
    """What a judge is asked and how its answers become a score. All of it is in the judge's id."""

    template: str = "pointwise"
    """a shipped template or a .jinja file"""
    criteria: tuple[Criterion, ...] = Field((Criterion(),), min_length=1)
    reason: bool = True
    """a rationale before the verdict"""
    votes: int = Field(1, ge=1)
    """rationales drawn per question; their scores are averaged"""
    normalise: bool = True
    """leave out the probability of texts that are no verdict; otherwise it counts as the worst one"""
    min_mass: float = Field(0.5, ge=0, le=1)
    """a vote whose verdicts have less probability than this together is unparsed"""
    reference_key: str = ""
    """the payload key of a task whose value the judge is shown as the reference; empty for none"""
    show_thinking: bool = False
    """show what stands between thinking tags too"""
    max_characters: int = Field(8000, ge=100)
    """of a response; the middle of a longer one is cut out"""
    calibration: PlattConfig | None = None
    tie_zone: float = Field(0.05, ge=0, lt=0.5)
    """pairs: a win probability this close to 1/2 is a tie"""
    seed: int = 0
    """of the rationales"""

    @model_validator(mode="after")
    def _check(self) -> JudgeConfig:
        if not sum(criterion.weight for criterion in self.criteria) > 0:
            raise ValueError("criteria: their weights sum to 0; give one of them a weight")
        if self.votes > 1 and not self.reason:
            raise ValueError(f"votes={self.votes} without a rationale would all be equal; set reason=true, or votes=1")
        return self


COT = JudgeConfig(
    template="cot",
    criteria=(Criterion(text="Does every step follow, and does the reasoning lead to the final answer?"),),
    votes=3,
    show_thinking=True,
)
"""Does the reasoning support the answer? For CoT-Pass@K (algorithms.md section 17); `evidence["votes"]` has each call's
score, above 1/2 for yes, so that any, most or all of them can be asked for."""

FIRST, SECOND = "A", "B"
"""verdicts of a judge that compares"""
PAIRWISE = JudgeConfig(template="pairwise", criteria=(Criterion(text="Which response answers the task better?"),))


class _Opinion(NamedTuple):
    """What came of the votes on one question."""

    value: float | None
    status: ScoreStatus
    detail: str
    votes: list[float | None]
    texts: list[str]


class Judge:
    """Grades each response by itself. Example: `Judge(asker).score(rollouts)[0].value`, in [0, 1]."""

    def __init__(self, asker: Asker, cfg: JudgeConfig = JudgeConfig()) -> None:
        """Raises UserError for a template that cannot be used."""
        self.asker, self.cfg = asker, cfg
        self._template = Template.load(cfg.template)
        for criterion in cfg.criteria:
            self._template.check(criterion.text, criterion.choices, cfg.reason)
        self._id = _identity(asker, cfg, self._template)

    @property
    def model_id(self) -> str:
        return self._id

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """The rubric's weighted mean for each. A criterion without a readable verdict leaves the whole without a value.
        """
        return self.score_texts([r.task for r in rollouts], [r.completion.text for r in rollouts])

    def score_texts(self, tasks: Sequence[Task], responses: Sequence[str]) -> list[Score]:
        """As `score`, of texts."""
        pairs = list(zip(tasks, responses, strict=True))
        prompts = [self.prompt(task, response, c) for task, response in pairs for c in self.cfg.criteria]
        choices = [c.choices for _ in pairs for c in self.cfg.criteria]
        opinions = _opinions(self.asker, self.cfg, prompts, choices)
        n = len(self.cfg.criteria)
        return [self._score(opinions[i * n : (i + 1) * n]) for i in range(len(pairs))]

    def prompt(self, task: Task, response: str, criterion: Criterion) -> str:
        """What the judge reads: everything that a stranger may have written is made safe first."""
        safe = lambda text: untrusted(text, self.asker.specials, cap=self.cfg.max_characters)  # noqa: E731
        return self._template.render(
            {**_given(self.cfg, self.asker, task, criterion), "response": safe(_shown(self.cfg, response))}
        )

    def _score(self, opinions: Sequence[_Opinion]) -> Score:
        criteria = self.cfg.criteria
        parts = [
            {"criterion": c.text, "score": o.value, "status": o.status, "votes": o.votes, "texts": o.texts}
            for c, o in zip(criteria, opinions, strict=True)
        ]
        evidence: dict[str, Any] = {"criteria": parts, "votes": opinions[0].votes}
        lost = next((o for o in opinions if o.value is None), None)
        if lost is not None:
            return Score(value=None, status=lost.status, model_id=self._id, detail=lost.detail, evidence=evidence)
        value = weighted([o.value or 0.0 for o in opinions], [c.weight for c in criteria])
        if (platt := self.cfg.calibration) is not None:
            value = float(Platt(platt.slope, platt.intercept)(logit(np.array([value])))[0])
        return Score(value=value, model_id=self._id, evidence=evidence)


class Comparison(NamedTuple):
    """What became of two responses shown in both orders."""

    first_wins: float | None
    """probability that the first is the better; 1/2 for a tie"""
    status: ScoreStatus
    detail: str = ""
    orders: tuple[float | None, float | None] = (None, None)
    """P(the one shown first is better), in the order given and swapped"""


class PairwiseJudge:
    """Compares the responses of a group, two by two. The first criterion says what better means."""

    def __init__(self, asker: Asker, cfg: JudgeConfig = PAIRWISE) -> None:
        """Raises UserError for a template that cannot be used, or for several criteria."""
        self.asker, self.cfg = asker, cfg
        self._template = Template.load(cfg.template, pair=True)
        if len(cfg.criteria) != 1:
            raise UserError(f"criteria: {len(cfg.criteria)} of them; comparing two responses takes one")
        self._template.check(cfg.criteria[0].text, cfg.criteria[0].choices, cfg.reason)
        self._id = _identity(asker, cfg, self._template)

    @property
    def model_id(self) -> str:
        return self._id

    def compare(self, tasks: Sequence[Task], firsts: Sequence[str], seconds: Sequence[str]) -> list[Comparison]:
        """Each pair, in both orders; two that look alike are a tie, whatever a judge would say of their places."""
        orders = [
            (self.prompt(task, first, second), self.prompt(task, second, first))
            for task, first, second in zip(tasks, firsts, seconds, strict=True)
        ]
        asked = [prompt for given, swapped in orders if given != swapped for prompt in (given, swapped)]
        found = iter(_opinions(self.asker, self.cfg, asked, [(SECOND, FIRST)] * len(asked)))
        alike = Comparison(0.5, "ok", "they look alike")
        return [
            alike if given == swapped else compared(next(found), next(found), self.cfg.tie_zone)
            for given, swapped in orders
        ]

    def prompt(self, task: Task, first: str, second: str) -> str:
        """What the judge reads."""
        safe = lambda text: untrusted(text, self.asker.specials, cap=self.cfg.max_characters)  # noqa: E731
        both = {"first": safe(_shown(self.cfg, first)), "second": safe(_shown(self.cfg, second))}
        return self._template.render({**_given(self.cfg, self.asker, task, self.cfg.criteria[0]), **both})

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """For each, its mean win probability against the others of its group (a tie is half a win).

        A comparison whose verdict followed the order counts for neither; without any that counts there is no value.
        Raises UserError for a group of one.
        """
        groups: dict[int, list[int]] = {}
        for i, rollout in enumerate(rollouts):
            groups.setdefault(rollout.group, []).append(i)
        if alone := next((members for members in groups.values() if len(members) < 2), None):
            raise UserError(f"group {rollouts[alone[0]].group} has one response: comparing takes two or more")
        pairs = [pair for members in groups.values() for pair in combinations(members, 2)]
        text = [rollout.completion.text for rollout in rollouts]
        found = self.compare(
            [rollouts[a].task for a, _ in pairs], [text[a] for a, _ in pairs], [text[b] for _, b in pairs]
        )
        wins: list[list[float]] = [[] for _ in rollouts]
        lost: list[list[Comparison]] = [[] for _ in rollouts]
        for (a, b), comparison in zip(pairs, found, strict=True):
            if comparison.first_wins is None:
                lost[a].append(comparison)
                lost[b].append(comparison)
            else:
                wins[a].append(comparison.first_wins)
                wins[b].append(1 - comparison.first_wins)
        return [self._score(w, no) for w, no in zip(wins, lost, strict=True)]

    def _score(self, wins: list[float], lost: list[Comparison]) -> Score:
        evidence = {"wins": wins, "lost": [c.status for c in lost]}
        if wins:
            return Score(value=sum(wins) / len(wins), model_id=self._id, evidence=evidence)
        return Score(value=None, status=lost[0].status, model_id=self._id, detail=lost[0].detail, evidence=evidence)


def compared(given: _Opinion, swapped: _Opinion, tie_zone: float) -> Comparison:
    """Two opinions on the same pair, the second with the order swapped, as one."""
    orders = (given.value, swapped.value)
    if given.value is None or swapped.value is None:
        lost = given if given.value is None else swapped
        return Comparison(None, lost.status, lost.detail, orders)
    one, other = given.value - 0.5, 0.5 - swapped.value
    if one * other < 0 and min(abs(one), abs(other)) > tie_zone:
        said = f"P(the one shown first) is {given.value:.2f} and, swapped, {swapped.value:.2f}"
        return Comparison(None, "inconsistent", said, orders)
    p = swap_mean(given.value, swapped.value)
    return Comparison(0.5 if abs(p - 0.5) <= tie_zone else p, "ok", "", orders)


# ---------------------------------------------------------------------------------------------------- what is shared


@dataclass(frozen=True, kw_only=True)
class _Question:
    prompt: str
    choices: tuple[str, ...]


def _opinions(
    asker: Asker, cfg: JudgeConfig, prompts: Sequence[str], choices: Sequence[Sequence[str]]
) -> list[_Opinion]:
    """Every question once, though it be asked for twice."""
    asked = [_Question(prompt=p, choices=tuple(c)) for p, c in zip(prompts, choices, strict=True)]
    distinct = list(dict.fromkeys(asked))
    if not distinct:
        return []
    readings = asker.ask(
        [q.prompt for q in distinct], [q.choices for q in distinct], votes=cfg.votes, reason=cfg.reason, seed=cfg.seed
    )
    found = {q: opinion_of(each, cfg) for q, each in zip(distinct, readings, strict=True)}
    return [found[q] for q in asked]


def opinion_of(readings: Sequence[Reading], cfg: JudgeConfig) -> _Opinion:
    """The votes on one question: their mean where more than half of them can be read."""
    values: list[float | None] = []
    lost: list[tuple[ScoreStatus, str]] = []
    for reading in readings:
        mass = sum(reading.probabilities)
        if reading.status == "ok" and mass >= cfg.min_mass and mass > 0:
            values.append(min(1.0, expected(reading.probabilities, normalise=cfg.normalise)))
            continue
        values.append(None)
        short = f"the verdicts have probability {mass:.2f} together, expected {cfg.min_mass} or more"
        lost.append(("unparsed", short) if reading.status == "ok" else (reading.status, reading.detail))
    good = [value for value in values if value is not None]
    texts = [reading.text for reading in readings]
    if 2 * len(good) > len(values):
        return _Opinion(sum(good) / len(good), "ok", "", values, texts)
    # the machine's failure is named first: it is the one that may be asked again
    status, detail = next((each for each in lost if each[0] == "infra_error"), lost[0])
    return _Opinion(None, status, detail, values, texts)


def _given(cfg: JudgeConfig, asker: Asker, task: Task, criterion: Criterion) -> dict[str, Any]:
    reference = str(task.payload.get(cfg.reference_key, "")) if cfg.reference_key else ""
    if cfg.reference_key and not reference:
        raise UserError(f"task {task.id}: no {cfg.reference_key!r} in its payload to show the judge as the reference")
    return {
        "task": untrusted(prompt_text(task.prompt), asker.specials, cap=10**6),
        "reference": untrusted(reference, asker.specials, cap=10**6),
        "criterion": criterion.text,
        "choices": criterion.choices,
        "reason": cfg.reason,
    }


def _shown(cfg: JudgeConfig, response: str) -> str:
    return response if cfg.show_thinking else without_thinking(response)


def _identity(asker: Asker, cfg: JudgeConfig, template: Template) -> str:
    parts = f"{asker.model_id}\n{template.text}\n{cfg.model_dump_json()}"
    return hashlib.sha256(parts.encode()).hexdigest()[:16]
