"""What an RL update does, as frozen configs: one algorithm out of a union, and the parts every algorithm shares.

Defaults: each algorithm as its paper has it (algorithms.md section 8); mismatch correction and router by section 22.
`cabochon/rl/update.py` turns an `UpdateConfig` into functions, in one match.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cabochon.config import Frozen

Aggregation = Literal[
    "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant_length", "prompt_mean", "fixed_budget"
]
"""How per-token losses become one number (algorithms.md section 10; `cabochon/rl/batching.py`)."""


class Clip(Frozen):
    """Where the ratio pi / pi_proximal stops earning: [1 - low, 1 + high]."""

    low: float = Field(0.2, ge=0)
    high: float = Field(0.2, ge=0)
    dual: float = Field(0.0, ge=0)
    """largest loss of a token with negative advantage, as a multiple of |advantage|; above 1, 0 for no bound"""

    @model_validator(mode="after")
    def _check(self) -> Clip:
        if 0 < self.dual <= 1:
            raise ValueError(f"dual={self.dual} would clip below ratio 1; set it above 1, or to 0 for no bound")
        return self


class GroupBaseline(Frozen):
    """Advantage = (reward - mean of its group) / scale; groups are the samples of one prompt."""

    scale: Literal["group", "batch", "mean", "none"] = "group"
    """divide by the group's standard deviation, by that of its domain in the batch, by the group's mean (MaxRL), or
    not at all"""
    std_floor: float = Field(0.05, gt=0)
    """least standard deviation to divide by: judges that differ by 1e-7 are noise, not signal"""
    zero_variance: Literal["keep", "mask"] = "mask"
    """groups whose rewards are equal: their tokens count in the divisor (and in KL and entropy), or are left out"""
    tolerance: float = Field(1e-6, ge=0)
    """largest difference within a group that still is equal"""


class Overlong(Frozen):
    """Soft punishment by tokens: 0 up to max_tokens - buffer, then down to -1 at max_tokens (DAPO)."""

    max_tokens: int = Field(ge=1)
    buffer: int = Field(ge=1)

    @model_validator(mode="after")
    def _check(self) -> Overlong:
        if self.buffer > self.max_tokens:
            raise ValueError(f"buffer={self.buffer} is more than max_tokens={self.max_tokens}")
        return self


class Grpo(Frozen):
    """Group-relative advantages, token ratio, mean of each response's mean (2402.03300)."""

    kind: Literal["grpo"] = "grpo"
    baseline: GroupBaseline = GroupBaseline(zero_variance="keep")
    clip: Clip = Clip()
    aggregation: Aggregation = "seq_mean_token_mean"


class DrGrpo(Frozen):
    """GRPO without its two biases: no division by the deviation, none by the response's length (2503.20783)."""

    kind: Literal["dr_grpo"] = "dr_grpo"
    clip: Clip = Clip()
    max_tokens: int = Field(ge=1)
    """the constant a response's sum is divided by: the longest completion allowed"""


class Rloo(Frozen):
    """REINFORCE on whole responses against the mean of the others (2402.14740)."""

    kind: Literal["rloo"] = "rloo"
    clip: Clip | None = None
    """null: plain REINFORCE. Set: the clipped ratio of the whole response's probability, for several updates"""


class ReinforcePP(Frozen):
    """Token returns, whitened over the whole batch (REINFORCE++, 2501.03262); works with one sample per prompt."""

    kind: Literal["reinforce_pp"] = "reinforce_pp"
    group_baseline: bool = False
    """subtract the group's mean first (needs two samples per prompt)"""
    clip: Clip = Clip()
    aggregation: Aggregation = "token_mean"


class Dapo(Frozen):
    """GRPO with clip-higher, token mean, dynamic sampling and a soft length punishment (2503.14476)."""

    kind: Literal["dapo"] = "dapo"
    baseline: GroupBaseline = GroupBaseline()
    clip: Clip = Clip(low=0.2, high=0.28)
    overlong: Overlong | None = None
    dynamic_sampling: bool = True
    """only groups with some right and some wrong answers are trained on; others are sampled anew"""


class Gspo(Frozen):
    """One ratio per response, the geometric mean of its tokens' (2507.18071)."""

    kind: Literal["gspo"] = "gspo"
    baseline: GroupBaseline = GroupBaseline(zero_variance="keep")
    clip: Clip = Clip(low=3e-4, high=4e-4)


class Cispo(Frozen):
    """Every token keeps its gradient, with a capped importance weight (2506.13585)."""

    kind: Literal["cispo"] = "cispo"
    baseline: GroupBaseline = GroupBaseline()
    ratio_cap: float = Field(5.0, gt=0)
    """largest weight: absolute, not 1 + something"""
    aggregation: Aggregation = "token_mean"


class C3po(Frozen):
    """A fixed number of trained tokens in every update, each of weight 1 / budget (2506.14731)."""

    kind: Literal["c3po"] = "c3po"
    budget: int = Field(ge=1)
    """trained tokens per update, over all devices; about what a rollout batch brings, not more"""
    baseline: GroupBaseline = GroupBaseline(scale="batch")
    clip: Clip = Clip(low=0.2, high=0.28, dual=3.0)


class Ppo(Frozen):
    """A critic and generalised advantages over sampled tokens (1707.06347)."""

    kind: Literal["ppo"] = "ppo"
    clip: Clip = Clip()
    critic: Literal["own", "shared"] = "own"
    """a trunk of its own, or a head on the policy's"""
    value_clip: float = Field(0.2, ge=0)
    """how far a value may move from what it was before the update, 0 for no bound"""
    value_coef: float = Field(0.1, gt=0)
    """weight of the value loss in a shared trunk; not used by `own`, see critic_learning_rate"""
    critic_learning_rate: float | None = Field(None, gt=0)
    """of a trunk of its own; null: `optim.learning_rate`. A policy's 1e-6 is slow for a critic: others take 1e-5"""
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    """of returns, and of advantages unless length_adaptive"""
    length_adaptive: float = Field(0.0, ge=0)
    """above 0: lambda of the advantages is 1 - 1 / (length_adaptive x tokens) (VAPO: 0.05, with lam 1)"""
    bootstrap: bool = False
    """a truncated response ends with the critic's value of its last state, instead of as a failure"""
    warmup_updates: int = Field(10, ge=0)
    """updates of the critic before the policy's first, to the end of the rollout batch they fall into"""
    aggregation: Aggregation = "token_mean"

    @model_validator(mode="after")
    def _check(self) -> Ppo:
        if self.critic == "shared" and self.warmup_updates:
            raise ValueError("a shared trunk cannot be warmed up without the policy: set warmup_updates to 0")
        if self.critic == "shared" and self.critic_learning_rate is not None:
            raise ValueError("a shared trunk learns at the policy's rate: set critic_learning_rate to null")
        return self


Algorithm = Annotated[
    Grpo | DrGrpo | Rloo | ReinforcePP | Dapo | Gspo | Cispo | C3po | Ppo, Field(discriminator="kind")
]


class KlConfig(Frozen):
    """Distance from the reference policy (algorithms.md section 7). Needs a reference unless coef is 0."""

    coef: float = Field(0.0, ge=0)
    placement: Literal["loss", "reward"] = "loss"
    """a term of its own, or a penalty -coef x (logp - logp_reference) on every sampled token's reward"""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """of a loss; k1 and k3 are multiplied by the ratio, and k3 has the gradient of k2: as they stand their gradient is
    zero or wrong. Not used in the reward, where only k1 is right"""
    target: float | None = Field(None, gt=0)
    """mean KL per sampled token, nats, that coef is steered to; reward only"""
    horizon: float = Field(10_000, gt=0)
    """samples over which coef moves by its own size; not used without target"""

    @model_validator(mode="after")
    def _check(self) -> KlConfig:
        if self.target is not None and self.placement == "loss":
            raise ValueError("target steers a KL in the reward: set placement to reward, or target to null")
        if self.target is not None and not self.coef:
            raise ValueError("target multiplies coef, which is 0: set coef to where it is to start")
        return self


class MismatchConfig(Frozen):
    """What is done about tokens drawn by another policy: w = pi_proximal / pi_behaviour (algorithms.md section 11).

    What is refused gets weight 0 and still counts in the divisor, so that it does not lift what is left.
    """

    proximal: Literal["learner", "sampler"] = "learner"
    """the ratio's denominator: the learner's own log-probs, or the sampler's (then w is part of the ratio)"""
    weight: Literal["none", "token", "sequence"] = "token"
    """multiply by w: not at all, per token, or by the product over the response"""
    cap: float = Field(2.0, gt=0)
    """largest weight (truncated importance sampling)"""
    token_band: tuple[float, float] | None = (0.5, 5.0)
    """tokens with w outside are refused (IcePop); null for no mask"""
    sequence_band: tuple[float, float] | None = None
    """responses whose geometric mean of w lies outside are refused, such as [0.98, 1.02]"""
    veto: float = Field(1e-4, ge=0)
    """a response with a token of w below is refused whole; 0 switches it off"""

    @model_validator(mode="after")
    def _check(self) -> MismatchConfig:
        for name in ("token_band", "sequence_band"):
            band = getattr(self, name)
            if band is not None and not 0 <= band[0] <= 1 <= band[1]:
                raise ValueError(f"{name}={list(band)}: expected [low, high] with 0 <= low <= 1 <= high")
        corrects = self.weight != "none" or self.token_band or self.sequence_band or self.veto
        if self.proximal == "sampler" and corrects:
            raise ValueError(
                "proximal=sampler has w in the ratio already: set weight to none, token_band and sequence_band to "
                "null and veto to 0"
            )
        return self


class RouterConfig(Frozen):
    """The router during RL; its balance and z losses are in `aux`. Nothing here acts on a dense model."""

    replay: Literal["none", "r2", "r3"] = "r3"
    """experts of the trained tokens: the live router's choice, what the learner chose before the first update (R2), or
    what the sampler used (R3)"""
    freeze: bool = False
    """routers keep their weights"""


class UpdateConfig(Frozen):
    """How one batch of rollouts changes the policy."""

    algorithm: Algorithm
    kl: KlConfig = KlConfig()
    entropy_coef: float = Field(0.0, ge=0)
    """entropy bonus per trained token; Ring-lite takes 5e-4"""
    mismatch: MismatchConfig = MismatchConfig()
    router: RouterConfig = RouterConfig()
    minibatches: int = Field(1, ge=1)
    """updates per pass over a rollout batch, of whole groups"""
    epochs: int = Field(1, ge=1)
    """passes over a rollout batch"""

    @property
    def compares_samples(self) -> bool:
        """Whether a sample's advantage is relative to the others of its prompt, so that one alone teaches nothing."""
        if isinstance(self.algorithm, ReinforcePP):
            return self.algorithm.group_baseline
        return not isinstance(self.algorithm, Ppo)
