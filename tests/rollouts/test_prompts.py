"""Bad input: one line each, before anything is drawn. And how prompts are cut into pieces."""

import dataclasses

import jax
import numpy as np
import pytest

from cabochon.errors import UserError
from cabochon.rollouts.prompts import encode_prompt, pieces, prepare, stopped, text_of
from cabochon.rollouts.slots import SlotConfig, sample_key
from cabochon.testing import tiny_config
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Request, Sampling, Thinking

TOK = ByteTokenizer()
MODEL = tiny_config(vocab_size=TOK.vocab_size, max_positions=64)
CFG = SlotConfig(slots=2, length=48)


def said(prompt="hello", **sampling):
    request = Request(prompt=prompt, sampling=Sampling(**({"max_tokens": 8} | sampling)))
    with pytest.raises(UserError) as error:
        prepare(MODEL, TOK, CFG, request, "request 3")
    line = str(error.value)
    assert "\n" not in line
    return line


def test_bad_prompts():
    assert said("") == "request 3: the prompt is empty; give at least one token"
    assert "the prompt has 48 tokens; expected fewer than the context of 48" in said("x" * 48)
    assert "5 prompt tokens and max_tokens=44 do not fit in the context of 48; max_tokens can be 43" in said(
        max_tokens=44
    )
    assert f"token 9999 is not in the vocabulary; expected 0 to {TOK.vocab_size - 1}" in said(np.array([1, 9999]))


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"max_tokens": 0}, "sampling.max_tokens=0; expected 1 or more"),
        ({"n": 0}, "sampling.n=0; expected 1 or more"),
        ({"temperature": -1.0}, "sampling.temperature=-1.0; expected 0 (greedy) or more"),
        ({"temperature": float("nan")}, "sampling.temperature=nan"),
        ({"top_p": 0.0}, "sampling.top_p=0.0; expected more than 0"),
        ({"min_p": 1.5}, "sampling.min_p=1.5; expected 0 (off) to 1"),
        ({"top_k": -1}, "sampling.top_k=-1"),
        ({"stop": ("a", "")}, "sampling.stop=('a', ''); expected strings that are not empty"),
        ({"stop_ids": (5, 700)}, "sampling.stop_ids has id 700, unknown to the model; expected 0 to 262"),
        ({"logit_bias": {-1: 2.0}}, "sampling.logit_bias has id -1, unknown to the model"),
        ({"logit_bias": {1: float("inf")}}, "expected finite numbers"),
        ({"stop_ids": tuple(range(16))}, f"{16 + len(TOK.eos_ids)} stop ids; expected at most 16"),
    ],
)
def test_bad_settings(sampling, words):
    assert words in said(**sampling)


@pytest.mark.parametrize(
    ("thinking", "words"),
    [
        ({"max_tokens": 9}, "thinking.max_tokens=9 and 1 tokens of close tag do not fit in max_tokens=8"),
        ({"max_tokens": 8}, "do not fit in max_tokens=8; raise max_tokens or lower the budget"),
        ({"max_tokens": 3, "min_tokens": 4}, "thinking.min_tokens=4: expected 0 to thinking.max_tokens=3"),
        ({"max_tokens": 3, "close": " "}, "thinking.close is empty"),
        ({"max_tokens": 3, "forced": "stop"}, "thinking.forced='stop' must contain the close tag '</think>'"),
        ({"max_tokens": 3, "close": "[end of thought]"}, "thinking tags of 16 tokens; expected at most 8"),
    ],
)
def test_bad_budgets(thinking, words):
    assert words in said(thinking=Thinking(**thinking))


def test_prompts_become_ids():
    chat = encode_prompt(TOK, [{"role": "user", "content": "hi"}])
    assert TOK.decode(chat) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert TOK.decode(encode_prompt(TOK, "hi")).endswith("hi")
    np.testing.assert_array_equal(encode_prompt(TOK, np.array([1, 2])), [1, 2])


def test_the_stop_ids_are_the_models_and_the_requests():
    ready = prepare(MODEL, TOK, CFG, Request(prompt="a", sampling=Sampling(max_tokens=4, stop_ids=(7,))), "r")
    assert set(ready.stop_ids) == {7, *TOK.eos_ids}
    ignored = prepare(MODEL, TOK, CFG, Request(prompt="a", sampling=Sampling(max_tokens=4, ignore_eos=True)), "r")
    assert ignored.stop_ids == ()


def test_pieces_cover_the_prompt_and_waste_at_most_half():
    chunks = (32, 128, 512)
    for length in range(0, 1500):
        cut = pieces(length, chunks)
        assert sum(real for real, _ in cut) == length
        assert all(chunk in chunks and 0 < real <= chunk for real, chunk in cut)
        if length >= 16:
            assert sum(chunk for _, chunk in cut) <= 2 * length
    assert pieces(127, chunks) == [(127, 128)]
    assert pieces(129, chunks) == [(128, 128), (1, 32)]


def test_stop_strings():
    ids = TOK.encode("one STOP two STOP")
    assert stopped(TOK, ids, 0, ["STOP"]) == len("one STOP")
    assert stopped(TOK, ids, 8, ["STOP"]) == 9 or stopped(TOK, ids, len("one STOP two"), ["STOP"]) == len(ids)
    assert stopped(TOK, ids, 0, ["nothing"]) is None
    assert text_of(TOK, ids[:8], ["STOP"]) == "one "
    assert text_of(TOK, ids, ["TWO", "two"]) == "one STOP "


def test_keys_differ_by_seed_and_sample_and_take_any_seed():
    keys = {tuple(sample_key(seed, i).tolist()) for seed in (0, 1, 2**32, 2**64 - 1) for i in range(4)}
    assert len(keys) == 16
    same = jax.random.key_data(jax.random.fold_in(jax.random.key(5), 3))
    np.testing.assert_array_equal(sample_key(5, 3), same)


def test_requests_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request(prompt="a").seed = 3
