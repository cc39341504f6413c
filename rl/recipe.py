"""What an RL recipe holds. No jax, so the CLI starts quickly; the update itself is in `cabochon/rl/config.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, field_validator, model_validator

from cabochon.config import Frozen, RayConfig, StageConfig
from cabochon.rl.alarms import AlarmLimits
from cabochon.rl.config import Dapo, DrGrpo, UpdateConfig
from cabochon.rl.feed import CurriculumConfig
from cabochon.rl.rewards import SHAPING, LengthReward, RewardConfig, asked_tokens
from cabochon.types import Sampling, Task, Thinking


class ThinkingConfig(Frozen):
    """Tokens between <think> and </think> before the close tag is forced; forced tokens are never trained on."""

    max_tokens: int = Field(ge=0)
    min_tokens: int = Field(0, ge=0)


class SamplingConfig(Frozen):
    """How completions are drawn. Filters (top_k, top_p, min_p) train on another distribution than they sample from,
    which the mismatch weights then have to bridge."""

    max_tokens: int = Field(64, ge=1)
    """new tokens of a completion, thinking included"""
    temperature: float = Field(1.0, ge=1e-6, le=1e6)
    """of the samples, and of the policy that learns from them (algorithms.md section 11): log-probs, entropy and KL
    are at this temperature, as in TRL and verl"""
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, lt=1)
    stop: tuple[str, ...] = ()
    thinking: ThinkingConfig | None = None

    def drawn(self, n: int, *, routes: bool = False) -> Sampling:
        """`n` samples of each prompt."""
        think = Thinking(**self.thinking.model_dump()) if self.thinking else None
        return Sampling(
            max_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            min_p=self.min_p, stop=self.stop, thinking=think, n=n, routes=routes,
        )  # fmt: skip


def not_negative(shares: Mapping[str, float]) -> Mapping[str, float]:
    """Raises ValueError for a share below 0."""
    if bad := [d for d, share in shares.items() if share < 0]:
        raise ValueError(f"{bad[0]}={shares[bad[0]]}: expected 0 or more")
    return shares


class TasksConfig(Frozen):
    """What is to be solved: JSONL files of tasks (docs/rl.md has the shapes)."""

    train: tuple[str, ...] = Field(min_length=1)
    held_out: tuple[str, ...] = ()
    """for evaluation only; a prompt that is also in `train` is refused"""
    chat: bool = False
    """a prompt that is text goes through the chat template, as after an SFT with data.chat; an environment opens the
    conversation itself"""
    shares: Mapping[str, float] = Field(default_factory=dict)
    """domain -> its share of the prompts, relative to the others'; a domain that is not named has its tasks' number"""
    curriculum: CurriculumConfig | None = None
    """draw within a domain by how often tasks are solved, instead of each in turn"""
    sandbox: Literal["bubblewrap", "docker"] = "bubblewrap"
    """where programs of `code` tasks, and those of the `python` tool, run"""
    verifying: int = Field(2, ge=1)
    """completions judged at the same time"""

    @field_validator("shares")
    @classmethod
    def _not_negative(cls, shares: Mapping[str, float]) -> Mapping[str, float]:
        return not_negative(shares)


class EngineConfig(Frozen):
    """Who samples."""

    kind: Literal["ray", "local"] = "ray"
    """workers in processes of their own, or this process, which then samples and learns in turn"""
    slots: int = Field(32, ge=1)
    """sequences decoded together by each worker"""
    length: int = Field(256, ge=8)
    """prompt and completion of one sequence, in tokens"""
    reuse: int = Field(0, ge=0)
    """tokens that a later turn of an episode must share with an earlier one for its keys and values to be taken from
    there instead of being read again; 0: never. Agrees with a fresh reading to 1e-5, not to the last bit"""
    tensor: int = Field(1, ge=1)
    """devices that share one engine, each with a part of every layer; a Ray worker needs them all (`ray.resources`)"""
    ray: RayConfig = RayConfig()
    """not used by `local`"""


class RolloutConfig(Frozen):
    """The rollouts of one step."""

    prompts: int = Field(16, ge=1)
    """groups per step"""
    group_size: int = Field(8, ge=1)
    """completions of each prompt"""
    max_lag: int = Field(0, ge=0)
    """updates that may happen between drawing a completion's first token and training on it: 0 draws and learns in
    turn, 1 draws the next step's rollouts while it learns, more keeps more in flight"""
    refills: int = Field(4, ge=0)
    """times prompts x refills further groups may be drawn in place of dropped ones, before a step goes on with less"""

    @property
    def completions(self) -> int:
        return self.prompts * self.group_size


class EvalConfig(Frozen):
    """Held-out accuracy along the way."""

    every: int = Field(0, ge=0)
    """steps between evaluations, 0 for none; before the first step and after the last there is always one"""
    tasks: int = Field(200, ge=1)
    """of the held-out ones at most, the first of each domain alike"""
    samples: int = Field(2, ge=1)
    """completions per task, drawn as in training"""


class EnvironmentConfig(Frozen):
    """Episodes of several turns in place of single completions (docs/episodes.md). `sampling` is of one turn,
    `engine.length` of the whole episode; the verifier judges the last turn."""

    tools: tuple[Literal["calculator", "python"], ...] = ()
    """that the policy may call; a turn without a call is its answer"""
    system: str = ""
    """`tools` only: the message the conversation begins with"""
    address: str = ""
    """or an environment of your own, `path.py:Class` or `module:Class`, made anew for each episode"""
    turns: int = Field(8, ge=1)
    """of the policy, at most"""
    seconds: float = Field(120.0, gt=0)
    """an episode may spend in its environment"""
    observation_chars: int = Field(4000, ge=1)
    """of one message; the middle of a longer one is left out"""
    parallel: int = Field(8, ge=1)
    """environments that answer at the same time"""

    @model_validator(mode="after")
    def _check(self) -> EnvironmentConfig:
        if bool(self.tools) == bool(self.address):
            raise ValueError("expected either tools or an address")
        if self.system and self.address:
            raise ValueError("system is for tools; an environment of your own begins the conversation itself")
        return self


class PhaseConfig(Frozen):
    """What is otherwise from a step on. What it does not name is as in the recipe, not as in the phase before."""

    name: str
    """for the log"""
    start: int = Field(ge=2)
    """its first step; it lasts until the next phase"""
    shares: Mapping[str, float] | None = None
    """as `tasks.shares`: a domain that is not named has its tasks' number, so give 0 to those to leave out"""
    max_tokens: int | None = Field(None, ge=1)
    """as `sampling.max_tokens`"""
    thinking: ThinkingConfig | None = None
    """as `sampling.thinking`: budgets that grow or shrink are phases"""
    length: LengthReward | None = None
    """as `reward.length`"""

    @field_validator("shares")
    @classmethod
    def _not_negative(cls, shares: Mapping[str, float] | None) -> Mapping[str, float] | None:
        return shares if shares is None else not_negative(shares)


class ScorerConfig(Frozen):
    """A reward model beside the verifiers; `reward.combine` says what its scores do."""

    address: str
    """a scalar reward model's directory, a language model that judges, or one behind an endpoint: http://host/v1#NAME"""
    judge: str = "judge-terse"
    """recipe of how a language model judges; not used by a scalar model"""


class RlConfig(StageConfig):
    """`cabochon rl`."""

    stage: Literal["rl"] = "rl"
    """which command the recipe is for"""
    steps: int = Field(ge=0)
    """rollout batches; each is one or more optimiser steps"""
    tasks: TasksConfig
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    sampling: SamplingConfig = SamplingConfig()
    environment: EnvironmentConfig | None = None
    """what answers the policy between its turns; none: a completion is one turn"""
    reward: RewardConfig = RewardConfig()
    phases: tuple[PhaseConfig, ...] = ()
    """a schedule of mixtures, lengths and budgets, in order"""
    models: Mapping[str, ScorerConfig] = Field(default_factory=dict)
    """reward models by name, in order of preference"""
    update: UpdateConfig
    eval: EvalConfig = EvalConfig()
    alarms: AlarmLimits = AlarmLimits()
    fail_on_alarm: bool = False
    """stop at the first alarm instead of printing it"""
    samples_every: int = Field(10, ge=0)
    """steps between tables of completions on the console, 0 for none; rollouts/ has them all"""

    def phase(self, step: int) -> int:
        """Which phase a step is in; 0 is what comes before the first of `phases`."""
        return sum(p.start <= step for p in self.phases)

    def in_phase(self, phase: int) -> RlConfig:
        """The recipe as that phase has it."""
        if phase == 0:
            return self
        p = self.phases[phase - 1]
        drawn = {"max_tokens": p.max_tokens, "thinking": p.thinking}
        sampling = self.sampling.model_copy(update={k: v for k, v in drawn.items() if v is not None})
        tasks = self.tasks if p.shares is None else self.tasks.model_copy(update={"shares": p.shares})
        reward = self.reward if p.length is None else self.reward.model_copy(update={"length": p.length})
        return self.model_copy(update={"tasks": tasks, "sampling": sampling, "reward": reward})

    @property
    def longest(self) -> int:
        """Tokens a completion can have at most, in the phase that allows it the most."""
        most = max(self.in_phase(i).sampling.max_tokens for i in range(len(self.phases) + 1))
        return min(self.environment.turns * most, self.engine.length) if self.environment else most

    @property
    def reached(self) -> list[RlConfig]:
        """The recipe in each phase that begins before the run ends."""
        return [self.in_phase(i) for i in range(self.phase(self.steps) + 1)]

    def phases_of(self, domain: str) -> list[RlConfig]:
        """Those in which tasks of a domain are drawn, or may be finished: where groups are under way when a phase ends,
        and where they are begun again after a kill, it is the next one that samples and rewards them."""
        drawn = [bool(p.tasks.shares.get(domain, 1.0)) for p in self.reached]
        carried = self.rollout.max_lag > 0 or isinstance(self.update.algorithm, Dapo)
        return [p for i, p in enumerate(self.reached) if drawn[i] or (carried and any(drawn[:i]))]

    def check_tasks(self, train: Sequence[Task]) -> None:
        """Raises UserError naming a task that lacks what the reward of a phase it is drawn or finished in needs."""
        for domain in dict.fromkeys(task.domain for task in train):
            if any(phase.reward.length is not None for phase in self.phases_of(domain)):
                for task in train:
                    if task.domain == domain:
                        asked_tokens(task)

    @model_validator(mode="after")
    def _check(self) -> RlConfig:
        starts = [p.start for p in self.phases]
        if starts != sorted(set(starts)):
            raise ValueError(f"phases: starts {starts}; expected each after the one before")
        names = ["first", *(p.name for p in self.phases)]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ValueError(f"phases: two are called {twice[0]!r} (the one before them all is 'first'); metrics tell "
                             "them apart by name")  # fmt: skip
        for i in range(len(self.phases) + 1):
            s, where = self.in_phase(i).sampling, f"phases[{i - 1}]" if i else "sampling"
            if s.max_tokens >= self.engine.length:
                raise ValueError(
                    f"{where}.max_tokens={s.max_tokens} leaves no room for a prompt in engine.length="
                    f"{self.engine.length}"
                )
            if s.thinking and s.thinking.max_tokens >= s.max_tokens:
                raise ValueError(
                    f"{where}.thinking.max_tokens={s.thinking.max_tokens} leaves nothing for the answer in max_tokens="
                    f"{s.max_tokens}"
                )
        if self.engine.kind == "local" and self.rollout.max_lag:
            raise ValueError("engine.kind=local samples and learns in turn: set rollout.max_lag to 0, or kind to ray")
        if taken := sorted({*SHAPING, "environment"} & set(self.models)):
            raise ValueError(f"models.{taken[0]}: that name is not a model's; choose another")
        if self.reward.combine == "gated" and not (self.models or (self.environment and self.environment.address)):
            raise ValueError(
                "reward.combine=gated orders right answers by a model or an environment, and there is none: name one "
                "in models, or set reward.combine to route"
            )
        self.reward.check_components(["verifier", *(["environment"] if self.environment else []), *self.models])
        self._check_lengths()
        self._check_shapes()
        return self

    def _check_lengths(self) -> None:
        algorithm, bound = self.update.algorithm, f"no completion is longer than {self.longest} tokens"
        if self.environment is None:
            bound += " (sampling.max_tokens, phases)"
        else:
            bound += " (sampling.max_tokens x environment.turns, engine.length)"
        if isinstance(algorithm, Dapo) and algorithm.overlong and algorithm.overlong.max_tokens > self.longest:
            raise ValueError(
                f"update.algorithm.overlong.max_tokens={algorithm.overlong.max_tokens} punishes nobody in full: {bound}"
            )
        if isinstance(algorithm, DrGrpo) and algorithm.max_tokens < self.longest:
            raise ValueError(
                f"update.algorithm.max_tokens={algorithm.max_tokens} is to be the longest completion: it divides, and "
                f"less makes updates larger; set it to {self.longest}, since {bound}"
            )

    def _check_shapes(self) -> None:
        size, algorithm = self.rollout.group_size, self.update.algorithm
        if size < 2 and self.update.compares_samples:
            raise ValueError(
                f"rollout.group_size={size}: update.algorithm.kind={algorithm.kind} compares the samples of a prompt; "
                "expected 2 or more"
            )
        groups = -(-self.rollout.prompts // self.update.minibatches)
        need = rows_needed(groups, size, self.engine.length, self.step.sequence_length)
        if need > self.step.batch_size:
            raise ValueError(
                f"step.batch_size={self.step.batch_size} rows of step.sequence_length={self.step.sequence_length} "
                f"tokens may not hold {groups} groups of {size} completions of up to engine.length="
                f"{self.engine.length}; set step.batch_size to {need} (micro-batches that stay empty cost nothing) or "
                "raise update.minibatches"
            )


def rows_needed(groups: int, size: int, longest: int, length: int) -> int:
    """Rows of `length` tokens that are enough for groups of completions of up to `longest` tokens with their prompt.

    The worst case, where no prompt is worth sharing and no two groups share a row. Raises ValueError where one
    completion does not fit a row.
    """
    if not 0 < longest <= length:
        raise ValueError(f"prompt and completion of {longest} tokens do not fit step.sequence_length={length}")
    return groups * -(-size // (length // longest))
