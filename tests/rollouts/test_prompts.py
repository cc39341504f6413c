"""Bad input: one line each, before anything is drawn. And how prompts are cut into pieces."""

import dataclasses
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from cabochon.errors import UserError
from cabochon.rollouts.filters import draw
from cabochon.rollouts.prompts import encode_prompt, pieces, prepare, stopped, text_of
from cabochon.rollouts.slots import SlotConfig, make_knobs, sample_keys, seed_words
from cabochon.testing import tiny_config
from cabochon.tokenizer import ByteTokenizer, Tokenizer
from cabochon.types import Request, Sampling, Thinking

TOK = ByteTokenizer()
MODEL = tiny_config(vocab_size=TOK.vocab_size, max_positions=64)
CFG = SlotConfig(slots=2, length=48)


def sentencepiece():
    """Tokens `▁a`, `▁b` and spaces; its decoder drops the space a text begins with, as Llama 2's."""
    core = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["▁", "a", "b", "▁a", "▁b", "▁▁"])},
                                           merges=[("▁", "a"), ("▁", "b"), ("▁", "▁")]))  # fmt: skip
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return Tokenizer(core=core, special={}, eos_ids=(), templates={}, config={}, source="test")


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
        ({"temperature": -1.0}, "sampling.temperature=-1.0; expected 0 (greedy) or 1e-06 to 1e+06"),
        ({"temperature": 1e-10}, "sampling.temperature=1e-10; expected 0 (greedy) or 1e-06"),
        ({"temperature": 1e39}, "sampling.temperature=1e+39; expected 0 (greedy) or 1e-06 to 1e+06"),
        ({"temperature": float("nan")}, "sampling.temperature=nan"),
        ({"top_p": 0.0}, "sampling.top_p=0.0; expected 1e-06 to 1 (off)"),
        ({"top_p": 1e-38}, "sampling.top_p=1e-38; expected 1e-06 to 1 (off)"),
        ({"min_p": 1.5}, "sampling.min_p=1.5; expected 0 (off) to 1"),
        ({"top_k": -1}, "sampling.top_k=-1"),
        ({"top_k": 2**31}, "sampling.top_k=2147483648; expected 0 (off) or more, below 2^31"),
        ({"stop": ("a", "")}, "sampling.stop=('a', ''); expected strings that are not empty"),
        ({"stop_ids": (5, 700)}, "sampling.stop_ids has id 700, unknown to the model; expected 0 to 262"),
        ({"logit_bias": {-1: 2.0}}, "sampling.logit_bias has id -1, unknown to the model"),
        ({"logit_bias": {1: float("inf")}}, "sampling.logit_bias[1]=inf; expected -1e+09 to 1e+09"),
        ({"logit_bias": {1: float("nan")}}, "sampling.logit_bias[1]=nan; expected -1e+09 to 1e+09"),
        ({"logit_bias": {1: 2.0, 7: 1e30}}, "sampling.logit_bias[7]=1e+30; expected -1e+09 to 1e+09"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "sampling.logit_bias has 301 ids; expected at most 300"),
        ({"stop_ids": tuple(range(16))}, f"{16 + len(TOK.eos_ids)} stop ids; expected at most 16"),
    ],
)
def test_bad_settings(sampling, words):
    assert words in said(**sampling)


def test_the_furthest_settings_that_are_taken_give_numbers():
    choices = product((0.0, 1e-6, 1e6), (0, 1, 2**31 - 1), (1e-6, 1.0), (0.0, 1e-45, 1.0), (-1e9, 100.0, 1e9))
    knobs = []
    for temperature, top_k, top_p, min_p, bias in choices:
        s = Sampling(max_tokens=8, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, logit_bias={5: bias})
        prepare(MODEL, TOK, CFG, Request(prompt="a", sampling=s), "r")
        knobs.append(make_knobs(s, MODEL.vocab_size))
    rows = len(knobs)
    logits = 30 * jax.random.normal(jax.random.key(0), (rows, MODEL.vocab_size))
    none, uniform = jnp.full((rows, 1), MODEL.vocab_size), jax.random.uniform(jax.random.key(1), (rows, 2))
    drawn = draw(logits, jax.tree.map(lambda *x: jnp.stack(x), *knobs), none, uniform, jnp.ones(rows, bool))
    assert np.isfinite(drawn.logp_B).all()
    assert np.isfinite(drawn.raw_logp_B).all()


def test_a_prompt_that_is_only_scored_may_fill_the_context():
    ids = np.zeros(48, np.int32)
    request = Request(prompt=ids, sampling=Sampling(max_tokens=1))
    assert len(prepare(MODEL, TOK, CFG, request, "r", draw=False).tokens) == 48
    with pytest.raises(UserError, match="has 48 tokens; expected fewer than the context of 48"):
        prepare(MODEL, TOK, CFG, request, "r")
    with pytest.raises(UserError, match="has 49 tokens; expected at most the context of 48"):
        prepare(MODEL, TOK, CFG, dataclasses.replace(request, prompt=np.append(ids, 0)), "r", draw=False)


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


def test_a_completion_keeps_the_space_it_begins_with():
    tok = sentencepiece()
    ids = tok.encode("a b a")
    assert text_of(tok, ids[1:], ()) == " b a"
    assert text_of(tok, ids[1:], (" a",)) == " b"
    assert stopped(tok, ids[1:], 0, (" b",)) == 1


def test_keys_differ_by_seed_and_sample_and_take_any_seed():
    def keys_of(seed, first):
        return sample_keys(jnp.asarray(seed_words(seed)), jnp.int32(first), 4)

    keys = [np.asarray(keys_of(seed, 0)) for seed in (0, 1, 2**32, 2**64 - 1)]
    assert len({tuple(key) for some in keys for key in some.tolist()}) == 16
    same = jax.random.key_data(jax.random.fold_in(jax.random.key(5), 3))
    np.testing.assert_array_equal(keys_of(5, 3)[0], same)


def test_requests_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request(prompt="a").seed = 3
