"""Runs that train nothing, or the wrong thing, say so in their first steps (architecture.md section 7).

One pure function from a step's row of metrics and a small state to alarms, each with what to do about it. A rule reads
only what the row has. It fires once its condition has held for so many steps in a row, and again only after it was gone
for `QUIET` steps, since a reading that hovers about its limit has nothing new to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, nan
from operator import ge, gt, lt
from typing import Any, NamedTuple

from pydantic import Field

from cabochon.config import Frozen

Row = Mapping[str, Any]
State = dict[str, float]
"""Plain JSON for the checkpoint: consecutive steps per rule, readings of the first step, what the score was lately and
at its best, and as `quiet.RULE` for how many steps, at most `QUIET`, a rule that fired has had nothing to say. Begins
empty."""

QUIET = 10
"""steps without its condition after which a rule may fire again"""
LATELY = 8
"""steps that a score is averaged over"""


class Alarm(NamedTuple):
    """`name` is stable; `said` has the number that set it off."""

    name: str
    step: int
    said: str
    remedy: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.said}. {self.remedy}"


class AlarmLimits(Frozen):
    """Where readings become alarms (algorithms.md section 22)."""

    truncated: float = Field(0.5, gt=0, le=1)
    """share of completions cut off at the length limit"""
    flat_groups: float = Field(0.9, gt=0, le=1)
    """share of groups that are all right or all wrong, whose rewards are all alike, or that were dropped for that"""
    no_answer: float = Field(0.9, gt=0, le=1)
    """share of verdicts without an answer to judge"""
    infra_errors: float = Field(0.5, gt=0, le=1)
    """share of completions that nobody could judge, or that have no reward because a reward model failed"""
    reward_clipped: float = Field(0.5, gt=0, le=1)
    """share of rewards that `reward.clip` changes"""
    logprob_kl: float = Field(1e-2, gt=0)
    """k3 of sampler against learner, nats per token"""
    logprob_large: float = Field(1e-3, gt=0)
    """share of tokens that sampler and learner disagree on by more than 2 nats"""
    refused: float = Field(0.2, gt=0, le=1)
    """share of tokens that the mismatch correction refuses"""
    clipped: float = Field(0.5, gt=0, le=1)
    """share of tokens whose gradient clipping takes"""
    entropy: float = Field(0.1, ge=0)
    """least mean entropy per token, nats; 0 for no floor"""
    violation: float = Field(2.0, gt=1)
    """largest expert load above the mean, as a multiple of the first step's"""
    reference_kl: float = Field(1.0, gt=0)
    """KL to the reference at the policy's first step, nats per token: there both should be nearly the same model"""
    fall: float = Field(0.15, gt=0)
    """how far the score, or the reward where there is no verifier, may fall below its best, as a share of it; both
    averages of some steps"""
    budget_fill: float = Field(0.9, ge=0)
    """least share of a fixed token budget that a rollout batch brings"""


def _read(row: Row, key: str) -> float | None:
    """`a.b` of nested rows; None where it is not there."""
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


Said = Callable[[Row, State, AlarmLimits], str | None]
"""What is wrong, or None."""
Limit = Callable[[AlarmLimits], float]


def _all(limits: AlarmLimits) -> float:
    return 1.0


@dataclass(frozen=True, kw_only=True)
class _Rule:
    name: str
    after: int
    """steps in a row"""
    said: Said
    remedy: str


def _reads(key: str, compare: Callable[[float, float], bool], limit: Limit, text: str) -> Said:
    """Where the reading compares so with its limit; a share of 1 is as much as a limit of 1 can ask for, hence `ge`."""

    def said(row: Row, state: State, limits: AlarmLimits) -> str | None:
        value = _read(row, key)
        return text.format(value) if value is not None and compare(value, limit(limits)) else None

    return said


def _zero(key: str, text: str, *unless_zero: str) -> Said:
    """`unless_zero`: other readings that explain this one, and have a rule of their own."""

    def said(row: Row, state: State, limits: AlarmLimits) -> str | None:
        explained = any(_read(row, other) == 0 for other in unless_zero)
        return text if _read(row, key) == 0 and not explained else None

    return said


def _flat(row: Row, state: State, limits: AlarmLimits) -> str | None:
    solved, failed = _read(row, "groups_solved") or 0.0, _read(row, "groups_failed") or 0.0
    if max(solved, failed) >= 1 or solved + failed < limits.flat_groups or _dropped(row, state, limits):
        return None
    return f"{solved + failed:.0%} of the groups are all right or all wrong and teach nothing"


def _dropped(row: Row, state: State, limits: AlarmLimits) -> str | None:
    """Of dynamic sampling; where nothing is left the run stops by itself."""
    dropped, groups = _read(row, "groups_dropped"), _read(row, "groups")
    if dropped is None or not groups or dropped / groups < limits.flat_groups:
        return None
    return f"{dropped:.0f} of {groups:.0f} groups were drawn in vain, for they have nothing to teach"


def _alike(row: Row, state: State, limits: AlarmLimits) -> str | None:
    """Where right and wrong do not explain it: they have rules of their own."""
    alike, flat = _read(row, "groups_alike"), sum(_read(row, f"groups_{x}") or 0.0 for x in ("solved", "failed"))
    if alike is None or alike < limits.flat_groups or flat >= limits.flat_groups:
        return None
    return f"in {alike:.0%} of the groups all rewards are the same, so that they teach nothing"


def _no_answer(row: Row, state: State, limits: AlarmLimits) -> str | None:
    share = sum(_read(row, f"status.{kind}") or 0.0 for kind in ("no_answer", "malformed"))
    return f"{share:.0%} of the completions hold no answer to judge" if share >= limits.no_answer else None


def _unjudged(row: Row, state: State, limits: AlarmLimits) -> str | None:
    errors, all_ = _read(row, "infra_errors"), _read(row, "completions")
    if errors is not None and all_ and errors / all_ >= limits.infra_errors:
        reason = f", most often: {row['infra_reason']}" if row.get("infra_reason") else ""
        return f"{errors / all_:.0%} of the completions could not be judged{reason}"
    lost, kept = row.get("unrewarded_by"), _read(row, "kept")
    if not lost or not kept or sum(lost.values()) / kept < limits.infra_errors:
        return None
    source = max(lost, key=lambda name: lost[name])
    return f"{sum(lost.values()) / kept:.0%} of the completions have no reward, most often because {source!r} gave none"


def _violation(row: Row, state: State, limits: AlarmLimits) -> str | None:
    now, first = _read(row, "moe.max_violation"), state.get("first.max_violation")
    if now is None or first is None or now <= limits.violation * max(first, 1.0):
        return None
    return f"the busiest expert's load is {now:.1f} above the mean, {first:.1f} at the first step"


def _watched(row: Row) -> tuple[str, float]:
    """The score, or the reward where no verifier gave one; nan for neither."""
    for what in ("score", "reward"):
        if (value := _read(row, what)) is not None and isfinite(value):
            return what, value
    return "reward", nan


def _lately(row: Row, state: State) -> State:
    """What `_fallen` compares: of the phase the run is in, since another draws other tasks. Nothing where a curriculum
    chooses, whose tasks grow harder as the policy gets better. `best` is of an average over twice as many steps as
    `mean`: the best of a thousand noisy ones would be luck."""
    what, value = _watched(row)
    of = f"lately.{what}.{row.get('phase', '')}"
    steps = state.get(f"{of}.steps", 0) + 1
    if not isfinite(value) or "curriculum" in row:
        return {}
    if steps == 1 and (old := state.get(f"{of}.old", 0)) < (_read(row, "lag.max") or 0):
        return {f"{of}.old": old + 1}  # the first groups of a phase were begun in the one before

    def average(name: str, new: float, over: int) -> float:
        old = state.get(f"{of}.{name}", new)
        return old + (new - old) / min(steps, over)

    mean, slow = average("mean", value, LATELY), average("slow", value, 2 * LATELY)
    found = {"steps": steps, "last": value, "mean": mean, "slow": slow}
    found["jump"] = average("jump", abs(value - state.get(f"{of}.last", value)), 4 * LATELY)
    found["best"] = max(slow, state.get(f"{of}.best", slow)) if steps > LATELY else slow
    return {f"{of}.{name}": x for name, x in found.items()}


def _fallen(row: Row, state: State, limits: AlarmLimits) -> str | None:
    """By clearly more than from one step to the next: a batch of hard tasks is no fall."""
    what, _ = _watched(row)
    mean, jump, best = (state.get(f"lately.{what}.{row.get('phase', '')}.{x}") for x in ("mean", "jump", "best"))
    if mean is None or jump is None or best is None or best - mean <= max(limits.fall * abs(best), 1.5 * jump):
        return None
    return f"the {what} has fallen to {mean:.2f}, from {best:.2f} at its best"


def _reference(row: Row, state: State, limits: AlarmLimits) -> str | None:
    kl = state.get("first.kl")
    if kl is None or abs(kl) <= limits.reference_kl:
        return None
    return f"the reference policy is {abs(kl):.1f} nats per token away before anything was learnt"


RULES = (
    _Rule(name="all_wrong", after=2, said=_reads("groups_failed", ge, _all, "every completion is judged wrong"),
          remedy="Easier tasks, more SFT, or the verifier reads another format: look at rollouts/ for what it wrote"),
    _Rule(name="all_right", after=2, said=_reads("groups_solved", ge, _all, "every completion is judged right"),
          remedy="Harder tasks; or the verifier accepts anything: try it with `cabochon reward test`"),
    _Rule(name="flat_groups", after=3, said=_flat,
          remedy="Tasks solved sometimes (a mixture, or update.algorithm.kind=dapo, which samples anew), or "
                 "larger groups"),
    _Rule(name="dropped", after=3, said=_dropped,
          remedy="Tasks solved sometimes: an easier or harder mixture (tasks.shares), or larger groups"),
    _Rule(name="alike", after=3, said=_alike,
          remedy="What is rewarded must tell completions of one prompt apart: look at rollouts/ for what each source "
                 "gave, and whether reward.clip or a weight takes the difference away"),
    _Rule(name="reward_clip", after=2, said=_reads("reward_clipped", ge, lambda x: x.reward_clipped,
                                                   "reward.clip changes {:.0%} of the rewards"),
          remedy="Set reward.clip to the range of what the environment or the reward models give, or scale it there"),
    _Rule(name="truncated", after=1, said=_reads("truncated", ge, lambda x: x.truncated,
                                                 "{:.0%} of the completions were cut off at the length limit"),
          remedy="Raise sampling.max_tokens, or check that the model learnt its end-of-text token (chat template)"),
    _Rule(name="empty", after=1, said=_reads("empty", ge, lambda _: 0.5, "{:.0%} of the completions have no token"),
          remedy="The prompt ends where the model ends its own turn: check the chat template and the stop strings"),
    _Rule(name="no_answer", after=2, said=_no_answer,
          remedy="Check the chat template and what the prompt asks for against what the verifier reads"),
    _Rule(name="unjudged", after=1, said=_unjudged,
          remedy="Mend what it stumbles over (rollouts/ has what each source said), or the machine (`cabochon "
                 "doctor`); these are not trained on"),
    _Rule(name="nothing_trained", after=1, said=_zero("trained_tokens", "no token was trained on"),
          remedy="Every completion was left out: rewards equal in each group, or none at all (see unrewarded)"),
    _Rule(name="learning_rate", after=2, said=_zero("learning_rate", "the learning rate is 0"),
          remedy="Set optim.learning_rate, or a schedule that does not end before the run: optim.total_steps"),
    _Rule(name="gradient", after=1, said=_zero("grad_norm", "the gradient is 0", "trained_tokens"),
          remedy="Every advantage is 0 or every token refused: see groups_* and w_refused"),
    _Rule(name="weights", after=2, said=_zero("weights_change", "the published weights are those of the step before",
                                              "learning_rate", "trained_tokens", "grad_norm"),
          remedy="Updates are lost on their way to the sampler, or are too small for its number format"),
    _Rule(name="logprobs", after=2, said=_reads("w_kl", gt, lambda x: x.logprob_kl,
                                               "sampler and learner differ by {:.3f} nats per token (k3)"),
          remedy="Stale or different weights, filtered samples, or unreplayed routes: "
                 "update.router.replay=r3, no sampling.top_k, top_p or min_p, a smaller rollout.max_lag"),
    _Rule(name="logprob_outliers", after=2, said=_reads("w_large", gt, lambda x: x.logprob_large,
                                                        "sampler and learner differ by 2 nats on {:.2%} of tokens"),
          remedy="As for log-probs; single tokens point to routes that were not replayed"),
    _Rule(name="refused", after=2, said=_reads("w_refused", gt, lambda x: x.refused,
                                               "the mismatch correction refuses {:.0%} of the tokens"),
          remedy="Lower rollout.max_lag, or widen update.mismatch.token_band once the log-prob gap is understood"),
    _Rule(name="clipped", after=3, said=_reads("clip_fraction", gt, lambda x: x.clipped,
                                               "clipping takes the gradient of {:.0%} of the tokens"),
          remedy="Lower optim.learning_rate, or fewer update.minibatches and update.epochs"),
    _Rule(name="entropy", after=3, said=_reads("entropy", lt, lambda x: x.entropy,
                                               "the policy hardly varies any more: {:.3f} nats per token"),
          remedy="Raise update.algorithm.clip.high or update.entropy_coef; where the score rises no more, stop here"),
    _Rule(name="fall", after=2, said=_fallen,
          remedy="Lower optim.learning_rate or raise update.kl.coef; where the "
                 "reward rises meanwhile, it is a reward model that is learnt, and not the task"),
    _Rule(name="dead_experts", after=3, said=_reads("moe.dead_experts", gt, lambda _: 0.0,
                                                  "{:.0f} experts, of all layers together, got no token"),
          remedy="Raise aux.balance, set update.router.freeze=true, or check the checkpoint's routers"),
    _Rule(name="load", after=3, said=_violation,
          remedy="The router collapses: raise aux.balance, set update.router.freeze=true, lower optim.learning_rate"),
    _Rule(name="reference", after=1, said=_reference,
          remedy="Is it another model, or one with another tokenizer or chat template?"),
    _Rule(name="stale", after=2, said=_reads("groups_stale", gt, lambda _: 0.0,
                                             "{:.0f} groups were thrown away, older than rollout.max_lag"),
          remedy="The sampler does not take new weights (see events.jsonl), or groups take longer than max_lag steps"),
    _Rule(name="budget", after=3, said=_reads("budget_fill", lt, lambda x: x.budget_fill,
                                              "rollouts bring {:.0%} of the token budget"),
          remedy="Lower update.algorithm.budget or raise rollout.prompts: the budget divides, so updates weaken"),
)  # fmt: skip


def check(row: Row, step: int, state: State, limits: AlarmLimits = AlarmLimits()) -> tuple[list[Alarm], State]:
    """Alarms that go off at this step, and the state for the next call. `row` as it stands in metrics.jsonl."""
    new = {**state}
    kl = _read(row, "kl_reference" if "kl_reference" in row else "kl_reward")
    for name, value in (("first.max_violation", _read(row, "moe.max_violation")), ("first.kl", kl)):
        if value is not None:
            new.setdefault(name, value)
    new |= _lately(row, state)
    alarms = []
    for rule in RULES:
        said = rule.said(row, new, limits)
        held = state.get(rule.name, 0) + 1 if said else 0
        new[rule.name] = held
        quiet = state.get(f"quiet.{rule.name}", QUIET)
        if said and held == rule.after and quiet >= QUIET:
            alarms.append(Alarm(rule.name, step, said, rule.remedy))
            quiet = 0
        elif quiet < QUIET:
            quiet = 0 if said else quiet + 1
        new[f"quiet.{rule.name}"] = quiet
    return alarms, new
