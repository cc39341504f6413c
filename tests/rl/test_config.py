"""The union is chosen by kind; contradictions are errors of one line."""

import pytest
from pydantic import TypeAdapter, ValidationError

from cabochon.rl.config import Algorithm, C3po, Clip, Gspo, KlConfig, MismatchConfig, Overlong, Ppo, UpdateConfig
from cabochon.rl.recipe import RlConfig
from cabochon.rl.train import slot_config


def test_kind_chooses_the_algorithm():
    adapter = TypeAdapter(Algorithm)
    assert adapter.validate_python({"kind": "gspo"}) == Gspo()
    assert UpdateConfig.model_validate({"algorithm": {"kind": "c3po", "budget": 64}}).algorithm == C3po(budget=64)
    with pytest.raises(ValidationError, match="gspo"):
        adapter.validate_python({"kind": "trpo"})
    with pytest.raises(ValidationError, match="ratio_cap"):
        adapter.validate_python({"kind": "gspo", "ratio_cap": 2})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Clip(dual=0.5), "dual=0.5 would clip below ratio 1"),
        (lambda: Overlong(max_tokens=4, buffer=5), "buffer=5 is more than max_tokens=4"),
        (lambda: Ppo(critic="shared"), "set warmup_updates to 0"),
        (lambda: Ppo(critic="shared", warmup_updates=0, critic_learning_rate=1e-5), "critic_learning_rate to null"),
        (lambda: KlConfig(coef=0.1, target=1.0), "set placement to reward, or target to null"),
        (lambda: KlConfig(placement="reward", target=1.0), "target multiplies coef, which is 0"),
        (lambda: MismatchConfig(token_band=(2, 5)), r"token_band=\[2.0, 5.0\]: expected \[low, high\] with"),
        (lambda: MismatchConfig(proximal="sampler"), "w in the ratio already"),
        (lambda: C3po(budget=0), "greater than or equal to 1"),
    ],
)
def test_contradictions_are_refused(make, said):
    with pytest.raises(ValidationError, match=said):
        make()


def test_the_engines_settings_reach_the_sampler():
    said = {"kind": "local", "slots": 3, "length": 96, "reuse": 16, "tensor": 2}
    cfg = RlConfig.model_validate(
        {"steps": 1, "update": {"algorithm": {"kind": "grpo"}}, "model": {"address": "m"}, "engine": said,
         "tasks": {"train": ["t.jsonl"]}, "run": {"dir": "r"},
         "rollout": {"prompts": 1, "group_size": 2}, "step": {"batch_size": 2, "sequence_length": 128}}
    )  # fmt: skip
    slots = slot_config(cfg)
    assert {key: getattr(slots, key) for key in said if key != "kind"} == {k: v for k, v in said.items() if k != "kind"}
