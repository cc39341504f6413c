"""A reward model by its address: a directory with a scalar model, a language model as a judge, or an endpoint's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from cabochon.config import Frozen, PatienceConfig
from cabochon.model.address import open_language_model, resolve
from cabochon.model.config import ModelConfig
from cabochon.model.hf_config import read_json
from cabochon.protocols import PolicyEngine, Reward
from cabochon.reward.asking import Asker, Endpoint, EndpointAsker, LocalAsker, Reasoning
from cabochon.reward.judge import PAIRWISE, Judge, JudgeConfig, PairwiseJudge
from cabochon.reward.scorer import ModelReward, directory_id, file_id
from cabochon.tokenizer import Tokenizer
from cabochon.types import Thinking

MakeEngine = Callable[[ModelConfig, Mapping[str, Any], Tokenizer, int], PolicyEngine]
"""(model, parameters, tokenizer, tokens of the longest prompt and rationale) -> an engine that draws from them"""


MakeEndpoint = Callable[[str, PatienceConfig], Endpoint]
"""(`http://host/v1#name`, how patient to be) -> what asks that model"""


class JudgeRun(Frozen):
    """A judge and how it is run: what a recipe with `stage: judge` holds."""

    stage: Literal["judge"] = "judge"
    """which command the recipe is for"""
    pairwise: bool = False
    """compare the responses of a group, instead of grading each by itself"""
    judge: JudgeConfig = JudgeConfig()
    max_tokens: int = Field(256, ge=1)
    """of a rationale"""
    temperature: float = Field(1.0, ge=0)
    """of the rationale; verdicts are read from log-probs, not drawn"""
    thinking_tokens: int = Field(0, ge=0)
    """a budget for thinking before the rationale, 0 for no thinking"""
    length: int = Field(1024, ge=16)
    """tokens of prompt, rationale and verdict together; never more than the model's context"""
    rows: int = Field(8, ge=1)
    """of that length, computed together"""
    top_logprobs: int = Field(20, ge=0, le=20)
    """likeliest tokens an endpoint is to report at the verdict; 0 for one that gives no log-probs: then the text is
    read. Not used by a model of ours"""
    endpoint: PatienceConfig = PatienceConfig()
    """how an endpoint is asked. Not used by a model of ours"""

    @model_validator(mode="before")
    @classmethod
    def _for_pairs(cls, given: Any) -> Any:
        """Pairs have defaults of their own."""
        judge = given.get("judge", {}) if isinstance(given, Mapping) and given.get("pairwise") else None
        if not isinstance(judge, Mapping):
            return given
        return {**given, "judge": {**PAIRWISE.model_dump(include={"template", "criteria"}), **judge}}

    @model_validator(mode="after")
    def _check(self) -> JudgeRun:
        if self.pairwise and self.judge.calibration is not None:
            raise ValueError("judge.calibration is of single verdicts; leave it out, or set pairwise=false")
        return self

    @property
    def reasoning(self) -> Reasoning:
        thinking = Thinking(max_tokens=self.thinking_tokens) if self.thinking_tokens else None
        return Reasoning(max_tokens=self.max_tokens, temperature=self.temperature, thinking=thinking)


def is_scalar(address: str) -> bool:
    """Is there a scalar reward model at this address?"""
    file = resolve(address).path / "config.json"
    return file.is_file() and "ForSequenceClassification" in str(read_json(file).get("architectures"))


def local_asker(address: str, run: JudgeRun, make_engine: MakeEngine) -> LocalAsker:
    """A language model of ours. `make_engine` is called where the judge reasons."""
    model, params, tokenizer = open_language_model(address)
    path = Path(resolve(address).path)
    params = jax.tree.map(jnp.asarray, params)
    return LocalAsker(
        model,
        params,
        tokenizer,
        model_id=directory_id(path) if path.is_dir() else file_id(path),
        engine=make_engine(model, params, tokenizer, run.length) if run.judge.reason else None,
        reasoning=run.reasoning,
        length=run.length,
        rows=run.rows,
    )


def is_endpoint(address: str) -> bool:
    return address.startswith(("http:", "https:"))


def open_asker(address: str, run: JudgeRun, make_engine: MakeEngine, make_endpoint: MakeEndpoint) -> Asker:
    """A language model of ours, or an endpoint's, whose address is all there is to pin it by."""
    if not is_endpoint(address):
        return local_asker(address, run, make_engine)
    endpoint = make_endpoint(address, run.endpoint)
    return EndpointAsker(endpoint, name=address, reasoning=run.reasoning, top_logprobs=run.top_logprobs)


def judge_of(asker: Asker, run: JudgeRun) -> Judge | PairwiseJudge:
    return PairwiseJudge(asker, run.judge) if run.pairwise else Judge(asker, run.judge)


def open_reward(
    address: str, run: JudgeRun, make_engine: MakeEngine, make_endpoint: MakeEndpoint
) -> ModelReward | Judge | PairwiseJudge:
    """The reward model at an address, frozen: a scalar one, or a language model that judges as `run` says."""
    if not is_endpoint(address) and is_scalar(address):
        return ModelReward.open(address, rows=run.rows)
    return judge_of(open_asker(address, run, make_engine, make_endpoint), run)


def usage_of(reward: Reward) -> dict[str, float]:
    """What an endpoint's judge was asked so far, and what that cost; empty for models of ours."""
    asker = reward.asker if isinstance(reward, Judge | PairwiseJudge) else None
    return asdict(asker.endpoint.usage) if isinstance(asker, EndpointAsker) else {}
