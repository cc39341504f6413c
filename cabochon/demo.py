"""`make tour`: the parts at work, on real weights, in a few minutes on a laptop without a network.

1. the doctor's report; 2. SmolLM2-135M becomes a mixture of four experts and is written as a Hugging Face directory;
3. read back, it computes the dense model's logits; 4. both answer a question, greedily; 5. answers are judged: maths in
a process that can be killed, code in a sandbox.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cabochon import cli_weights, doctor
from cabochon.chat import encode_chat
from cabochon.model import transformer as tf
from cabochon.model.address import open_language_model
from cabochon.policy import Policy
from cabochon.protocols import Weights
from cabochon.rollouts.local import LocalEngine
from cabochon.rollouts.slots import SlotConfig
from cabochon.types import Message, Request, Sampling, Task
from cabochon.verifiers.build import verifier_for

SOURCE = "smollm2-135m-instruct"
PLACE = Path("runs/demo/smollm2-moe")
QUESTION = "What is the capital of France?"
NEW_TOKENS = 32
PADDING = 19
TOLERANCE = 1e-5
"""of the largest logit. float32 leaves about 3e-6 after 30 layers: so much do the dense model's own logits change when
the row is padded, which part three prints beside the difference it is about."""

SORTED = Task(id="sort", prompt="Write sort_words.", verifier="code", payload={
    "tests": ["assert sort_words('b a') == 'a b'", "assert sort_words('') == ''"]})  # fmt: skip
SUM = Task(id="sum", prompt="What is 1/2 + 1/3?", verifier="math", payload={"answer": "5/6"})
JUDGED = (
    (SUM, "Common denominator 6: \\boxed{\\frac{5}{6}}", "the answer"),
    (SUM, "Add across: \\boxed{\\frac{2}{5}}", "a wrong answer"),
    (SUM, "Huge: \\boxed{9^{9^{9^{9}}}}", "a bomb"),
    (SORTED, "```python\ndef sort_words(s):\n    return ' '.join(sorted(s.split()))\n```", "a right program"),
    (SORTED, "```python\ndef sort_words(s):\n    return s\n```", "a wrong program"),
    (SORTED, "```python\nimport os\nos._exit(0)\n```", "a program that leaves early"),
    (SORTED, "```python\nopen('/etc/passwd', 'w')\ndef sort_words(s): return s\n```", "a program that writes outside"),
)
"""(task, completion, what it is)"""


def main() -> None:
    """Run all five parts; exit code 1 where the machine cannot, or where the logits differ."""
    _title("this machine")
    checks = doctor.run_checks()
    print(doctor.as_lines(checks, color=sys.stdout.isatty()))
    if not doctor.healthy(checks):
        sys.exit(1)

    _title(f"{SOURCE} -> four experts per layer, two per token, in {PLACE}")
    cli_weights.upcycle(SOURCE, PLACE, ["model.num_experts=4", "model.top_k=2"], overwrite=True)

    _title("the same function")
    models = {"dense": _open(SOURCE), "4 experts": _open(str(PLACE))}
    messages: list[Message] = [{"role": "user", "content": QUESTION}]
    prompt = encode_chat(models["dense"].tokenizer, messages, add_generation_prompt=True)
    dense, sparse = _logits(models["dense"], prompt), _logits(models["4 experts"], prompt)
    padded = _logits(models["dense"], prompt + [0] * PADDING)[: len(prompt)]
    scale = np.abs(dense).max()
    gap, noise = np.abs(dense - sparse).max() / scale, np.abs(dense - padded).max() / scale
    print(f"{dense.size:,} logits; largest difference, as a part of the largest logit ({scale:.1f}):")
    print(f"  4 experts against dense            {gap:.1e}")
    print(f"  dense against dense, row padded    {noise:.1e}   what float32 leaves")
    if not gap <= TOLERANCE:
        sys.exit(f"demo: expected at most {TOLERANCE:.0e}")

    _title(f"greedy answers to {QUESTION!r}")
    for name, policy in models.items():
        start = time.monotonic()
        text = greedy(policy, messages).strip()
        print(f"{name:10} {text}   [{time.monotonic() - start:.1f} s, compile included]")

    _title("verdicts")
    verifier = verifier_for([task for task, _, _ in JUDGED])
    for task, completion, what in JUDGED:
        verdict = verifier.verify(task, completion)
        score = "-" if verdict.score is None else f"{verdict.score:g}"
        print(f"{task.verifier:5} {what:30} score {score:2} {verdict.status:10} {verdict.detail[:60]}")


def greedy(policy: Policy, messages: Sequence[Message]) -> str:
    """The most likely answer, by the sampler."""
    weights = Weights(version=0, params=policy.params)
    engine = LocalEngine(policy.config, policy.tokenizer, weights, SlotConfig(slots=2, length=128, chunks=(32,)))
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0.0)
    return engine.generate([Request(prompt=messages, sampling=sampling)])[0].text


def _open(address: str) -> Policy:
    config, params, tokenizer = open_language_model(address)
    return Policy(config=config, params=params, tokenizer=tokenizer)


def _logits(policy: Policy, ids: Sequence[int]) -> np.ndarray:
    """[T, V]"""

    @jax.jit
    def run(params: tf.Params, ids_BT: jax.Array) -> jax.Array:
        return tf.logits(policy.config, params, tf.forward(policy.config, params, ids_BT).hidden_BTD)

    return np.asarray(run(policy.params, jnp.asarray([ids], jnp.int32)))[0]


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
