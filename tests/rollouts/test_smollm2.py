"""The real SmolLM2-135M: the sampler's greedy text is transformers', token for token."""

import jax
import numpy as np
import pytest

from cabochon.model import address, convert
from cabochon.model import transformer as tf
from cabochon.protocols import Weights
from cabochon.rollouts.local import LocalEngine
from cabochon.rollouts.slots import SlotConfig
from cabochon.types import Request, Sampling

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a small village"]
NEW = 16


def test_greedy_is_transformers_greedy(tmp_path):
    import torch
    import transformers

    config, params, tokenizer = address.open_model("smollm2-135m-instruct")
    convert.save(tmp_path / "m", config, params, tokenizer=tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    engine = LocalEngine(
        config, tokenizer, Weights(version=0, params=params), SlotConfig(slots=4, length=64, block=64, chunks=(16,))
    )
    greedy = Sampling(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    ids = [np.array(tokenizer.encode(p), np.int32) for p in PROMPTS]
    ours = engine.generate([Request(prompt=i, sampling=greedy) for i in ids])
    torch.set_num_threads(1)  # on two busy cores its second thread only waits
    for prompt, got in zip(ids, ours, strict=True):
        # by induction: fed our text, transformers' argmax at every position is the token we took next
        with torch.no_grad():
            z = theirs(torch.from_numpy(np.concatenate([prompt, got.tokens]).astype(np.int64))[None]).logits[0]
        assert got.tokens.tolist() == z.argmax(-1)[len(prompt) - 1 : -1].tolist()
    assert "Paris" in ours[0].text
    # and the log-probs are the learner's
    full = np.concatenate([ids[0], ours[0].tokens])[None]
    z = jax.jit(lambda p, t: tf.logits(config, p, tf.forward(config, p, t).hidden_BTD))(params, full)[0]
    expected = jax.nn.log_softmax(z, -1)[np.arange(len(ids[0]) - 1, full.shape[1] - 1), ours[0].tokens]
    np.testing.assert_allclose(ours[0].raw_logprobs, expected, atol=1e-4)
