"""The pieces a recipe is made of: frozen pydantic models, unknown keys forbidden. No jax, so the CLI starts quickly.

Stages (sft, reward, rl) hold these beside their own keys. Every key here changes what a run does; one that stops doing
so is removed. How files and `a.b=c` become one of these is in `cabochon/overrides.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cabochon.errors import UserError
from cabochon.model.config import ModelConfig

AXES = ("data", "fsdp", "expert", "tensor")
"""Mesh axes, outermost first: neighbours in the last axes are closest on the interconnect."""


class Frozen(BaseModel):
    """Base of every config: immutable, no unknown keys, no nan or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class UpcycleConfig(Frozen):
    """A dense checkpoint becomes a mixture of experts, exact at step 0 without noise (algorithms.md section 13)."""

    num_experts: int = Field(8, ge=1)
    """experts per layer, each a copy of the dense feed-forward"""
    top_k: int = Field(2, ge=1)
    """experts per token"""
    layers: tuple[int, ...] | None = None
    """layers that become sparse, from 0; null for all"""
    noise: float = Field(0.0, ge=0)
    """noise on the experts, as a fraction of each tensor's root mean square; 0 keeps the function exact"""
    router: Literal["normal", "orthogonal"] = "normal"
    """columns drawn from N(0, router_std), or orthonormal, which is where the simbal loss is zero"""
    router_std: float = Field(0.02, gt=0)
    """not used by `orthogonal`"""
    seed: int = Field(0, ge=0, lt=2**32)
    """of the router and of the noise"""

    @model_validator(mode="after")
    def _check(self) -> UpcycleConfig:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}")
        return self


class UpcycleRun(Frozen):
    """What `cabochon upcycle` is told beside its source and destination."""

    model: UpcycleConfig = UpcycleConfig()


class PolicyConfig(Frozen):
    """Where the policy comes from: weights at an address, or a shape to initialise from scratch. Exactly one is set."""

    address: str | None = None
    """a directory, a .gguf file, `hf:owner/name`, or a known name such as smollm2-135m-instruct"""
    scratch: ModelConfig | None = None
    """the shape of a randomly initialised model"""
    upcycle: UpcycleConfig | None = None
    """turn the dense weights at `address` into a mixture of experts first"""

    @model_validator(mode="after")
    def _check(self) -> PolicyConfig:
        if self.address is None and self.scratch is None:
            raise ValueError("set either address (weights to load) or scratch (a shape to initialise)")
        if self.address is not None and self.scratch is not None:
            raise ValueError("address and scratch are both set: give one and set the other to null")
        if self.upcycle is not None and self.address is None:
            raise ValueError("upcycle needs weights: set address, or give scratch a moe section instead")
        return self


class StepConfig(Frozen):
    """The shape of one optimiser step. Tokens per step = batch_size x sequence_length."""

    batch_size: int = Field(8, ge=1)
    """rows per optimiser step, over all devices and micro-batches"""
    sequence_length: int = Field(256, ge=2)
    """tokens per row"""
    micro_batches: int = Field(1, ge=1)
    """passes the batch is cut into; the result is that of one big batch"""
    remat: Literal["none", "full", "dots"] = "none"
    """what the backward pass recomputes: nothing, every layer, or all but the matrix products"""
    logit_chunk: int = Field(0, ge=0)
    """tokens whose logits exist at one time, 0 for all: bounds the [tokens, vocabulary] memory"""

    @model_validator(mode="after")
    def _check(self) -> StepConfig:
        if self.batch_size % self.micro_batches:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of micro_batches={self.micro_batches}")
        return self


class OptimConfig(Frozen):
    """The optimiser and its schedule."""

    kind: Literal["adamw", "adafactor"] = "adamw"
    """`adafactor` factors the second moment: rows + columns instead of rows x columns"""
    learning_rate: float = Field(1e-4, ge=0)
    """the peak, reached after warm-up"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """from the peak down to end_factor x peak at total_steps"""
    warmup_steps: int = Field(0, ge=0)
    """steps of linear rise from 0"""
    total_steps: int = Field(0, ge=0)
    """step at which the schedule has ended, warm-up included; not used by `constant`"""
    end_factor: float = Field(0.1, ge=0, le=1)
    """last learning rate / peak; not used by `constant`"""
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.95, ge=0, lt=1)
    """decay of the second moment; adafactor too"""
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    """decoupled; matrices only, never norms or biases"""
    clip_norm: float = Field(1.0, ge=0)
    """largest global gradient norm, 0 for no clipping"""

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.schedule != "constant" and self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"schedule={self.schedule} needs total_steps > warmup_steps={self.warmup_steps}, got {self.total_steps}"
            )
        return self


class MeshConfig(Frozen):
    """Devices along each axis; -1 on at most one axis means all that remain."""

    data: int = Field(1, ge=-1)
    """copies of the parameters, each with its part of the batch"""
    fsdp: int = Field(-1, ge=-1)
    """the batch *and* the parameters are split"""
    expert: int = Field(1, ge=-1)
    """experts are split; tokens travel to them"""
    tensor: int = Field(1, ge=-1)
    """heads and feed-forward columns are split"""

    @model_validator(mode="after")
    def _check(self) -> MeshConfig:
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if zero := [axis for axis, n in sizes.items() if n == 0]:
            raise ValueError(f"{zero[0]}=0: expected a number of devices, or -1 for all that remain")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"only one axis may be -1, got {', '.join(a for a, n in sizes.items() if n == -1)}")
        return self

    def shape(self, devices: int) -> Mapping[str, int]:
        """Devices per axis, in the order of AXES, for a machine of `devices`.

        Raises UserError where they do not multiply up.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        given = math.prod(n for n in sizes.values() if n != -1)
        text = " x ".join(f"{axis}={n}" for axis, n in sizes.items())
        if devices % given or (-1 not in sizes.values() and devices != given):
            hint = f"{given} does not divide {devices}" if -1 in sizes.values() else "set one axis to -1"
            raise UserError(f"mesh {text} does not use exactly this machine's {devices} devices; {hint}")
        return {axis: devices // given if n == -1 else n for axis, n in sizes.items()}


class PrecisionConfig(Frozen):
    """Number formats. Parameters and optimiser state are float32 masters; the router always computes in float32."""

    compute: Literal["float32", "bfloat16"] = "float32"
    """of matrix products and activations"""


class LoraConfig(Frozen):
    """Train low-rank additions instead of the weights: W + (alpha / rank) A B."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    targets: tuple[str, ...] = Field(("qkv", "out"), min_length=1)
    """names of the matrices that get one, as in the parameter tree"""


class AuxLossConfig(Frozen):
    """Router losses, added to the stage's own (algorithms.md section 12). A coefficient of 0 switches one off."""

    balance: float = Field(0.0, ge=0)
    """load balance E sum f P, 1 when even"""
    balance_scope: Literal["global", "micro"] = "global"
    """tokens f is counted over: the whole batch, or each micro-batch by itself"""
    router_z: float = Field(0.0, ge=0)
    """mean squared log-sum-exp of the router logits"""
    simbal: float = Field(0.0, ge=0)
    """entrywise L1 distance of the router's Gram matrix from the identity"""
    bias_update_rate: float = Field(0.0, ge=0)
    """step of the selection bias of models with moe.aux_free_bias"""


class TrainConfig(Frozen):
    """What every stage needs to build its train step; a stage's recipe adds its data and its loss."""

    model: PolicyConfig
    step: StepConfig = StepConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    precision: PrecisionConfig = PrecisionConfig()
    lora: LoraConfig | None = None
    aux: AuxLossConfig = AuxLossConfig()
    seed: int = Field(0, ge=0, lt=2**32)
    """of initialisation and of everything random in the run"""


class SourceConfig(Frozen):
    """One file of rows."""

    path: str
    """JSON lines, JSON, parquet, or a Hugging Face dataset directory"""
    weight: float = Field(1.0, gt=0)
    """how often each of its rows comes up in an epoch, on average"""


class ColumnsConfig(Frozen):
    """What a row's columns are called. A row is messages, else prompt and completion, else text, by what it has."""

    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"
    tools: str = "tools"
    """JSON schemas that the chat template shows, beside messages or a prompt"""


def as_sources(value: Any) -> Any:
    """`a.jsonl` or `[a.jsonl, {path: b.jsonl, weight: 2}]` as a list of sources: a validator for fields of them."""
    each = value if isinstance(value, list | tuple) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in each]


Sources = Annotated[tuple[SourceConfig, ...], BeforeValidator(as_sources)]
"""Read from a path, a list of paths, or a list of {path, weight}."""


class RunConfig(Frozen):
    """The run directory. Nothing here changes what is learnt, so a run may be resumed with other values."""

    dir: str = "runs/unnamed"
    """where the run is written; the same command again goes on where it stopped"""
    save_every: int = Field(100, ge=1)
    """steps between checkpoints"""
    keep_last: int = Field(2, ge=1)
    """newest checkpoints that stay on disk"""
    log_every: int = Field(10, ge=1)
    """steps between printed lines; metrics.jsonl has a row for every step"""
    tensorboard: bool = True
    """write TensorBoard event files to DIR/tensorboard"""
    trackers: tuple[Literal["mlflow", "trackio", "wandb"], ...] = ()
    """who else gets the numbers, such as [wandb]; each is an extra to install"""
    peak_tflops: float = Field(0.0, ge=0)
    """of one device, what utilisation is measured against; 0 measures a matrix product at the start"""


class StageConfig(TrainConfig):
    """What `cabochon.run` needs of a stage's recipe; a stage adds its data, its loss and `stage: Literal[...]`."""

    run: RunConfig = RunConfig()


class PatienceConfig(Frozen):
    """How an endpoint is asked, and how patient to be with it."""

    key_env: str = "OPENAI_API_KEY"
    """environment variable that holds the key; nothing is sent where it is not set"""
    concurrency: int = Field(16, ge=1)
    """requests under way at one time; after as many in a row without a reply, the rest of a call is not sent"""
    attempts: int = Field(4, ge=1)
    """times a request is sent at most"""
    attempt_seconds: float = Field(60.0, gt=0)
    """for one attempt, from its start to the last byte of the reply"""
    deadline_seconds: float = Field(300.0, gt=0)
    """for all attempts of a request together, pauses included"""
    backoff_seconds: float = Field(0.5, ge=0)
    """pause after the first failure; doubles each time, give or take a half"""
    prompt_price: float = Field(0.0, ge=0)
    """per million tokens, in whatever currency"""
    completion_price: float = Field(0.0, ge=0)


class RayConfig(Frozen):
    """Rollout workers in processes of their own, on this machine or on a cluster."""

    workers: int = Field(2, ge=1)
    cpus: float = Field(1.0, gt=0)
    """of each worker; its thread pools are no larger"""
    resources: Mapping[str, float] = Field(default_factory=dict)
    """what else a worker needs, by Ray's names: {TPU: 4}"""
    address: str | None = None
    """of a running cluster, else RAY_ADDRESS; without either, a local Ray is started"""
    start_seconds: float = Field(600.0, gt=0)
    """for a worker to be placed, to start, to compile and to take weights over"""
    deadline_seconds: float = Field(300.0, gt=0)
    """for an answer, and for one dispatch, compilation included; then the worker is replaced"""
    retries: int = Field(3, ge=0)
    """losses of workers in a row, or on one request, and publications of a version, before the run stops"""
