"""Losses and gradients of whole models equal TRL's own trainers' at equal weights, tokens and advantages."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from cabochon.config import StepConfig
from cabochon.learner import Learner, LearnerConfig
from cabochon.model import convert
from cabochon.rl.advantages import Advantages
from cabochon.rl.batching import minibatches
from cabochon.rl.config import Cispo, Clip, Dapo, DrGrpo, Grpo, Gspo, KlConfig, MismatchConfig, Rloo, UpdateConfig
from cabochon.rl.update import plan_update
from cabochon.types import Completion, Rollout, Task

pytestmark = pytest.mark.slow
COMMON = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
          "initializer_range": 0.3, "tie_word_embeddings": False}  # fmt: skip
MODELS = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
                               "moe_intermediate_size": 24, "router_aux_loss_coef": 0.0}),
}  # fmt: skip
KL = KlConfig(coef=0.2)
CASES = {
    "grpo": (Grpo(clip=Clip(low=0.1, high=0.15)), {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.15},
             KlConfig()),
    "grpo+kl": (Grpo(), {"loss_type": "grpo", "beta": 0.2, "use_bias_correction_kl": True}, KL),
    "dr_grpo": (DrGrpo(max_tokens=9), {"loss_type": "dr_grpo", "max_completion_length": 9}, KlConfig()),
    "dapo": (Dapo(), {"loss_type": "dapo", "epsilon_high": 0.28}, KlConfig()),
    "gspo": (Gspo(clip=Clip(low=0.02, high=0.03)), {"loss_type": "grpo", "importance_sampling_level": "sequence",
             "epsilon": 0.02, "epsilon_high": 0.03}, KlConfig()),
    "cispo": (Cispo(ratio_cap=1.1), {"loss_type": "cispo", "epsilon_high": 1.1}, KlConfig()),
    "temperature": (Grpo(), {"loss_type": "grpo", "temperature": 0.7}, KlConfig()),
    "rloo": (Rloo(clip=Clip(low=0.3, high=0.3)), {"epsilon": 0.3}, KlConfig()),
}  # fmt: skip
PROMPTS, COMPLETIONS = [3, 2, 4, 2], [5, 7, 2, 6]
RNG = np.random.default_rng(0)
TOKENS = [(RNG.integers(1, 64, p), RNG.integers(1, 64, c)) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
ADVANTAGES = np.array([1.2, -0.7, 0.4, -1.1])
NOISE = [[RNG.normal(0, 0.15, c) for c in COMPLETIONS] for _ in range(2)]


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """(torch model, our config, our parameters), of one set of weights."""
    import torch
    import transformers

    kind, keys = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**COMMON, **keys)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    place = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(place)
    return theirs, *convert.load(place)


def ours(config, params, algorithm, kl, temperature):
    """(loss, gradients, log-probs per completion) with proximal and reference log-probs at a fixed distance."""
    free = MismatchConfig(weight="none", token_band=None, veto=0)
    cfg = UpdateConfig(algorithm=algorithm, kl=kl, mismatch=free, minibatches=2)
    update = plan_update(cfg, sparse=False)
    rollouts = [
        Rollout(
            task=Task(id=str(i), prompt="", verifier="math"), group=0,
            completion=Completion(
                tokens=c.astype(np.int32), logprobs=np.zeros(len(c), np.float32), mask=np.ones(len(c), bool), text="",
                finish="stop", policy_version=np.zeros(len(c), np.int32), prompt_tokens=p.astype(np.int32),
            ),
        )
        for i, (p, c) in enumerate(TOKENS)
    ]  # fmt: skip
    step = StepConfig(batch_size=3, sequence_length=16)
    learner = Learner(LearnerConfig(model=config, step=step, temperature=temperature), update.loss)
    per_token = [np.full(n, a, np.float32) for n, a in zip(COMPLETIONS, ADVANTAGES, strict=True)]
    advantages = Advantages(tokens=per_token, keep_N=np.ones(4, bool))
    (made,) = minibatches(rollouts, advantages, update, learner.cfg.step, 1, np.random.default_rng(0))
    scores = made.at.from_rows(np.asarray(learner.score(params, made.batch).tokens.logp_BT))
    logp = {i: x for i, x in zip(made.members, scores, strict=True)}
    old, reference = ([logp[i] + n[i] for i in range(4)] for n in NOISE)
    batch = replace(
        made.batch,
        logp_proximal_BT=made.at.to_rows([old[i] for i in made.members]),
        logp_reference_BT=made.at.to_rows([reference[i] for i in made.members]),
    )

    def loss(params, batch):
        terms = update.loss(learner.outputs(params, batch).tokens, batch).terms
        return sum(term.value for term in terms.values())

    value, grads = jax.jit(jax.value_and_grad(loss))(params, batch)
    return float(value), grads, old, reference


def trainer_of(model, name, keys, place):
    """TRL's own trainer, which patches the model's head, on data that is never looked at."""
    import datasets
    import tokenizers
    import transformers
    import trl

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0")
    data = datasets.Dataset.from_dict({"prompt": ["w2 w3"] * 4})
    base = {"output_dir": str(place), "use_cpu": True, "bf16": False, "report_to": [], "num_generations": 2,
            "per_device_train_batch_size": 4, "gradient_checkpointing": False, "beta": 0.0}  # fmt: skip
    beta = keys.get("beta", 0.0)
    keys = {k: v for k, v in keys.items() if k != "beta"}
    rloo = name == "rloo"
    config = (trl.RLOOConfig if rloo else trl.GRPOConfig)(**(base | keys))
    trainer = (trl.RLOOTrainer if rloo else trl.GRPOTrainer)(
        model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config, train_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.beta = beta  # set now: the trainer would look for a reference model by name, and we give its log-probs
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def theirs(model, name, keys, old, reference, place):
    import torch

    trainer = trainer_of(model, name, keys, place)
    wide = lambda xs, n: torch.tensor(np.array([np.pad(x, (0, n - len(x))) for x in xs]))  # noqa: E731
    left = lambda xs, n: torch.tensor(np.array([np.pad(x, (n - len(x), 0)) for x in xs]))  # noqa: E731
    P, C = max(PROMPTS), max(COMPLETIONS)
    mask = wide([np.ones(n, int) for n in COMPLETIONS], C)
    inputs = {
        "prompt_ids": left([p for p, _ in TOKENS], P),
        "prompt_mask": left([np.ones(n, int) for n in PROMPTS], P),
        "completion_ids": wide([c for _, c in TOKENS], C),
        "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGES, dtype=torch.float32),
        "old_per_token_logps": wide(old, C).float(),
        "old_logps": torch.tensor([x.sum() for x in old]).float(),
        "ref_per_token_logps": wide(reference, C).float(),
        "num_items_in_batch": mask.sum(),
    }
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    grads = {n: p.grad for n, p in trainer.model.named_parameters()}
    return loss.item(), {n: p if grads[n] is None else grads[n] for n, p in trainer.model.state_dict().items()}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_trl_s(model, name, tmp_path):
    import copy

    torch_model, config, params = model
    algorithm, keys, kl = CASES[name]
    value, grads, old, reference = ours(config, params, algorithm, kl, keys.get("temperature", 1.0))
    patched = copy.deepcopy(torch_model)
    want, their_grads = theirs(patched, name, keys, old, reference, tmp_path)
    assert value == pytest.approx(want, abs=1e-5)
    holder = copy.deepcopy(torch_model)  # gradients take the way of weights into our layout
    holder.load_state_dict(their_grads)
    holder.save_pretrained(tmp_path / "grads")
    _, want_grads = convert.load(tmp_path / "grads", config=config)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    scale = np.abs(flat(want_grads)).max()
    assert scale > 1e-3
    np.testing.assert_allclose(flat(grads), flat(want_grads), atol=1e-5 * max(1.0, scale))
