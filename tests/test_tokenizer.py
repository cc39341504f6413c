"""Directories in and out, against transformers' AutoTokenizer on the same files; bytes; fingerprints."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from cabochon.errors import UserError
from cabochon.tokenizer import ByteTokenizer, TemplateText, Tokenizer, byte_letters

TEXTS = ["", "abc", " the the", "naïve\n\n🙂", "<eos>a<|x|>b", "A\u030a"]


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """What a published model looks like: byte-level BPE, NFC, a post-processor that adds BOS and trims offsets."""
    vocab = {c: i for i, c in enumerate(byte_letters())} | {"Ġt": 256, "he": 257, "Ġthe": 258}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(t, special=True) for t in ("<bos>", "<eos>")])
    bos = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 259)])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    core.enable_truncation(4)
    core.enable_padding(length=7, pad_token="<|x|>", pad_id=261)
    out = tmp_path / "model"
    out.mkdir()
    core.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<bos>", "special": True},
        "eos_token": "<eos>",
        "unk_token": None,
        "model_max_length": 512,
        "chat_template": "{{ messages[0].content }}",
        "added_tokens_decoder": {
            "259": {"content": "<bos>", "special": True},
            "260": {"content": "<eos>", "special": True},
            "261": {"content": "<|x|>", "special": False, "normalized": False},
        },
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    (out / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|x|>", "eos_token": "<bos>"}))
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [261, 260]}))
    return out


def test_a_published_directory(model_dir: Path) -> None:
    tok = Tokenizer.from_dir(model_dir)
    assert tok.encode(" the the") == [258, 258]  # neither cut to 4 tokens nor padded to 7
    assert tok.encode("the" * 9, add_special=True)[0] == 259
    assert len(tok.encode("the" * 9)) == 18
    assert tok.encode("a<|x|>b<eos>") == [97, 261, 98, 260]
    assert (tok.bos_id, tok.eos_ids, tok.pad_id, tok.vocab_size) == (259, (260, 261), 261, 262)
    assert (tok.id("<|x|>"), tok.token(261), tok.id("none"), tok.token(999)) == (261, "<|x|>", None, None)
    assert tok.decode([97, 261, 260]) == "a<|x|><eos>"
    assert tok.decode(np.array([97, 261, 260, 98]), skip_special=True) == "ab"  # the padding token is special
    assert tok.templates["default"].source == f"{model_dir / 'tokenizer_config.json'}: chat_template"


def test_ids_and_text_equal_transformers(model_dir: Path, tmp_path: Path) -> None:
    """The directory as published, the same saved by us, and the byte tokenizer's."""
    from transformers import AutoTokenizer

    Tokenizer.from_dir(model_dir).save(tmp_path / "again")
    ByteTokenizer().save(tmp_path / "bytes")
    for path in (model_dir, tmp_path / "again", tmp_path / "bytes"):
        ours, theirs = Tokenizer.from_dir(path), AutoTokenizer.from_pretrained(path)
        for text in [*TEXTS, "<|im_start|>user\n<think>é</think><|im_end|>"]:
            assert theirs(text, truncation=False)["input_ids"] == ours.encode(text, add_special=True)
            ids = ours.encode(text)
            assert theirs(text, add_special_tokens=False, truncation=False)["input_ids"] == ids
            for skip in (False, True):
                assert theirs.decode(ids, skip_special_tokens=skip) == ours.decode(ids, skip_special=skip)
        assert (theirs.bos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.pad_id)
        assert (theirs.eos_token_id, len(theirs)) == (ours.eos_ids[0], ours.vocab_size)
        assert theirs.chat_template == ours.templates["default"].text


def test_save_and_load_lose_nothing(model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tok = Tokenizer.from_dir(model_dir)
    line_ends = TemplateText(text="a\r\n{{ 'b' }}\n\n", source="x")
    tok = replace(tok, templates={"default": line_ends, "tool_use": TemplateText(text="tools", source="y")})
    tok.save(tmp_path / "out")
    again = Tokenizer.from_dir(tmp_path / "out")
    assert again.fingerprint() == tok.fingerprint()
    assert {n: t.text for n, t in again.templates.items()} == {"default": "a\r\n{{ 'b' }}\n\n", "tool_use": "tools"}
    assert (again.eos_ids, again.special) == (tok.eos_ids, tok.special)
    assert again.config["model_max_length"] == 512
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_chat_template(tools=[{"a": 1}]) == "tools"
    (tmp_path / "out" / "generation_config.json").write_text('{"eos_token_id": 5, "top_k": 3}')
    tok.save(tmp_path / "out")  # a generation_config.json that is there stays
    assert Tokenizer.from_dir(tmp_path / "out").eos_ids == (260, 5)


def test_ends_come_from_config_json_where_there_is_no_generation_config(model_dir: Path) -> None:
    (model_dir / "generation_config.json").unlink()
    assert Tokenizer.from_dir(model_dir).eos_ids == (260,)
    (model_dir / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.from_dir(model_dir).eos_ids == (260, 7)


    (model_dir / "generation_config.json").write_text('{"temperature": 0.5}')
    assert Tokenizer.from_dir(model_dir).eos_ids == (260, 7), "one that says nothing of ends has no say in them"


def test_how_a_model_is_sampled_is_kept(model_dir: Path, tmp_path: Path) -> None:
    given = {"eos_token_id": [261, 260], "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    (model_dir / "generation_config.json").write_text(json.dumps(given))
    Tokenizer.from_dir(model_dir).save(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved == {**given, "bos_token_id": 259, "eos_token_id": [260, 261], "pad_token_id": 261}


@pytest.mark.parametrize("name", ["../../victim/chat_template", "a/b", "..", "", "/tmp/x", "a\\b", ".hidden"])
def test_a_template_is_written_nowhere_else(name: str, model_dir: Path) -> None:
    templates = [{"name": "default", "template": "x"}, {"name": name, "template": "PWNED"}]
    edit(model_dir / "tokenizer_config.json", lambda config: config.update(chat_template=templates))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: chat_template: .* cannot be a template's name"):
        Tokenizer.from_dir(model_dir)


@pytest.mark.parametrize(
    ("here", "elsewhere", "role"),
    [
        ({"lstrip": True, "rstrip": True, "special": True, "normalized": False}, {}, True),
        ({"special": True, "single_word": True, "normalized": False}, {}, True),
        ({"special": True, "normalized": True}, {}, True),
        ({"special": True, "normalized": False}, {"rstrip": True}, True),
        ({"special": True, "normalized": False}, {"rstrip": True}, False),
        ({"special": False, "normalized": False}, {"special": True}, False),
    ],
)
def test_how_a_token_is_matched_is_as_transformers_has_it(
    here: dict[str, bool], elsewhere: dict[str, bool], role: bool, tmp_path: Path
) -> None:
    """`here` in tokenizer.json, `elsewhere` in tokenizer_config.json, which has the last word; with a role or not."""
    from transformers import AutoTokenizer

    vocab = {c: i for i, c in enumerate(byte_letters())}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken("<x>", **here)])
    core.save(str(tmp_path / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"eos_token": "<x>"} if role else {})
    if elsewhere:
        plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
        config["added_tokens_decoder"] = {"256": {"content": "<x>", **plain, **elsewhere}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ours, theirs = Tokenizer.from_dir(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ours.save(tmp_path / "again")
    for each in (ours, Tokenizer.from_dir(tmp_path / "again")):
        for text in ("a <x> b", "a<x>b", "A<X>B", "<x>"):
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert each.encode(text) == ids
            assert each.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "more",
    [
        {"additional_special_tokens": ["<|x|>", "<|y|>", "<|z|>"]},
        {"extra_special_tokens": {"image_token": "<|z|>"}},
        {"extra_special_tokens": ["<|z|>"]},
        {"additional_special_tokens": [{"content": "<|z|>", "rstrip": True, "normalized": False, "__type": "AddedToken",
                                        "lstrip": False, "single_word": False}]},
    ],
)  # fmt: skip
def test_special_tokens_without_a_role_are_tokens_too(more: dict[str, Any], model_dir: Path) -> None:
    from transformers import AutoTokenizer

    edit(model_dir / "tokenizer_config.json", lambda config: config.update(more))
    (model_dir / "config.json").write_text('{"model_type": "llama"}')
    ours, theirs = Tokenizer.from_dir(model_dir), AutoTokenizer.from_pretrained(model_dir)
    ids = theirs("a <|z|> b<|y|>", add_special_tokens=False, truncation=False)["input_ids"]
    assert 262 in ids
    assert ours.encode("a <|z|> b<|y|>") == ids
    assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)
    edit(model_dir / "tokenizer_config.json", lambda config: config.update(additional_special_tokens=[1]))
    with pytest.raises(UserError, match="additional_special_tokens: expected tokens, found 1"):
        Tokenizer.from_dir(model_dir)


def test_chat_template_file_wins(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").write_text("file")
    got = Tokenizer.from_dir(model_dir).templates["default"]
    assert (got.text, got.source) == ("file", str(model_dir / "chat_template.jinja"))


def test_half_of_a_surrogate_pair_is_read_as_a_question_mark(model_dir: Path) -> None:
    tok = Tokenizer.from_dir(model_dir)
    assert tok.encode("a\ud83db") == tok.encode("a?b")
    assert tok.encode_with_offsets("a\ud83db") == tok.encode_with_offsets("a?b")


def test_offsets_cover_every_character(model_dir: Path) -> None:
    """Spaces stay with their token (the post-processor would trim them), bytes of one letter share it."""
    tok = Tokenizer.from_dir(model_dir)
    text = "x the é"
    ids, offsets = tok.encode_with_offsets(text)
    assert ids == tok.encode(text)
    assert [text[a:b] for a, b in offsets] == ["x", " the", " ", "é", "é"]
    ids, offsets = tok.encode_with_offsets("A\u030aB")  # NFC makes one letter, two bytes, of the first two
    assert ids == [0xC3, 0x85, ord("B")]
    assert offsets == [(0, 1), (0, 1), (2, 3)]  # places in the text as given


def test_fingerprint_sees_what_matters_and_nothing_else(model_dir: Path) -> None:
    tok = Tokenizer.from_dir(model_dir)
    prints = [tok.fingerprint()]
    assert len(prints[0]) == 64
    assert Tokenizer.from_dir(model_dir).fingerprint() == prints[0]
    prints.append(replace(tok, eos_ids=(260,)).fingerprint())
    prints.append(replace(tok, special={}).fingerprint())
    prints.append(replace(tok, templates={}).fingerprint())
    file = model_dir / "tokenizer.json"
    edit(file, lambda d: d["model"]["merges"].reverse())
    prints.append(Tokenizer.from_dir(model_dir).fingerprint())
    assert Tokenizer.from_dir(model_dir).first_difference(tok) is None
    edit(file, lambda d: d["model"]["merges"].reverse())
    edit(file, lambda d: d.update(truncation=None, padding=None))
    assert Tokenizer.from_dir(model_dir).fingerprint() == prints[0]  # neither is used
    edit(file, lambda d: d["model"]["vocab"].update({"Ġt": 257, "he": 256}))
    other = Tokenizer.from_dir(model_dir)
    prints.append(other.fingerprint())
    assert len(set(prints)) == len(prints)
    assert tok.first_difference(other) == (256, "Ġt", "he")
    assert ByteTokenizer().first_difference(tok) == (256, "<pad>", "Ġt")


def test_bytes() -> None:
    tok = ByteTokenizer()
    assert tok.encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert all(tok.encode(chr(b)) == [b] for b in range(128))
    assert tok.decode(list(range(128))) == "".join(map(chr, range(128)))
    assert tok.decode([0xC3, 0xA9, 0xC3]) == "é\ufffd"
    assert tok.encode("<|im_start|><think></think><|im_end|><eos>") == [259, 261, 262, 260, 258]
    assert tok.decode([257, 97, 261, 262, 260], skip_special=True) == "a<think></think>"
    assert (tok.bos_id, tok.eos_ids, tok.pad_id, tok.vocab_size) == (257, (260, 258), 256, 263)
    text = "any text 🙂 \x00\x7f\r\n"
    assert tok.decode(tok.encode(text)) == text
    assert tok.encode(text) == list(text.encode())
    assert replace(tok, eos_ids=(258,)).eos_ids == (258,)


def test_bytes_saved_and_loaded(tmp_path: Path) -> None:
    tok = ByteTokenizer()
    tok.save(tmp_path)
    again = Tokenizer.from_dir(tmp_path)
    assert again.fingerprint() == tok.fingerprint()
    assert (again.eos_ids, again.bos_id, again.pad_id) == (tok.eos_ids, tok.bos_id, tok.pad_id)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


BROKEN = [
    ("tokenizer.json", None, "tokenizer.json: not found"),
    ("tokenizer.json", "{}", "tokenizer.json: not readable by tokenizers"),
    ("tokenizer_config.json", "{", "tokenizer_config.json: not valid JSON: Expecting property name"),
    ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object, got list"),
    ("tokenizer_config.json", '{"pad_token": "<p>"}', "pad_token '<p>' is not a token of tokenizer.json"),
    ("tokenizer_config.json", '{"eos_token": ["<eos>"]}', "eos_token ['<eos>'] is not a token of tokenizer.json"),
    ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "chat_template: expected text, or a list of"),
    (
        "tokenizer_config.json",
        '{"added_tokens_decoder": {"300": {"content": "<n>"}}}',
        "added_tokens_decoder gives '<n>' the id 300, tokenizer.json makes it 261",
    ),
]


@pytest.mark.parametrize(("name", "content", "says"), BROKEN)
def test_a_broken_directory_is_one_line(name: str, content: str | None, says: str, model_dir: Path) -> None:
    (model_dir / "special_tokens_map.json").unlink()
    if content is None:
        (model_dir / name).unlink()
    else:
        (model_dir / name).write_text(content)
    with pytest.raises(UserError) as caught:
        Tokenizer.from_dir(model_dir)
    assert str(caught.value).startswith(f"{model_dir / name}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def sentencepiece(decoder: decoders.Decoder) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(["▁", "a", "b", "▁a", "▁b", "▁▁", "<0xC3>", "<0xA9>"])}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a"), ("▁", "b"), ("▁", "▁")]))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoder
    core.add_tokens([AddedToken("<s>", special=True)])
    return Tokenizer(core=core, special={}, eos_ids=(), templates={}, config={}, source="test")


STEPS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


@pytest.mark.parametrize(
    ("decoder", "drops"),
    [
        (decoders.Sequence([*STEPS, decoders.Strip(" ", 1, 0)]), True),
        (decoders.Metaspace(), True),
        (decoders.Sequence(STEPS), False),
        (decoders.Metaspace(prepend_scheme="never"), False),
    ],
)
def test_what_follows_a_text_keeps_its_first_space(decoder: decoders.Decoder, drops: bool) -> None:
    tok = sentencepiece(decoder)
    assert tok.drops_space == drops
    a, b, two = tok.id("▁a"), tok.id("▁b"), tok.id("▁▁")
    assert tok.decode([a, b, a]) == ("a b a" if drops else " a b a")
    assert tok.decode_on([b, a]) == " b a"
    assert tok.decode_on([two, two, b]) == "     b"
    assert tok.decode_on([tok.id("<s>"), b], skip_special=True) == " b"
    assert tok.decode_on([]) == ""
    if not isinstance(decoder, decoders.Metaspace):
        assert tok.decode_on([tok.id("<0xC3>"), tok.id("<0xA9>"), b]) == "é b"


def test_bytes_follow_a_text_as_they_begin_one(model_dir: Path) -> None:
    for tok in (ByteTokenizer(), Tokenizer.from_dir(model_dir)):
        assert not tok.drops_space
        ids = tok.encode(" the \u2581é<eos>")
        assert [tok.decode_on(ids[i:]) for i in range(9)] == [tok.decode(ids[i:]) for i in range(9)]


def test_a_sentencepiece_only_directory_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UserError, match=r"tokenizer.json: not found; only tokenizer.model is there: save it once with"):
        Tokenizer.from_dir(tmp_path)


def test_pickles_for_ray_workers(model_dir: Path) -> None:
    for tok in (Tokenizer.from_dir(model_dir), ByteTokenizer()):
        again = pickle.loads(pickle.dumps(tok))
        assert type(again) is type(tok)
        assert (again.fingerprint(), again.encode("é<eos>")) == (tok.fingerprint(), tok.encode("é<eos>"))


def test_neither_torch_nor_jax_is_imported() -> None:
    program = (
        "import sys, cabochon.chat\nfrom cabochon.tokenizer import *\n"
        "cabochon.chat.encode_chat_with_mask(ByteTokenizer(), [{'role': 'user', 'content': 'x'}])\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'jax', 'flax') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_a_full_disk_is_the_error_python_has_for_it(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        ByteTokenizer().save(tmp_path)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"a": {"content": "<bos>"}}, "expected an id and an object with its text as content, found 'a'"),
        ({"259": {"special": True}}, "expected an id and an object with its text as content, found '259'"),
        ({"259": "<bos>"}, "expected an id and an object with its text as content, found '259': '<bos>'"),
        ("<bos>", "expected an object of id to token, found '<bos>'"),
        (["<bos>"], r"expected an object of id to token, found \['<bos>'\]"),
    ],
)
def test_added_tokens_that_are_none_are_one_line(model_dir, entries, said):
    edit(model_dir / "tokenizer_config.json", lambda config: config.update(added_tokens_decoder=entries))
    with pytest.raises(UserError, match=rf"tokenizer_config\.json: added_tokens_decoder: {said}"):
        Tokenizer.from_dir(model_dir)


def test_a_template_that_is_not_utf8_and_an_end_that_is_no_id_are_one_line(model_dir):
    (model_dir / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"chat_template\.jinja: not UTF-8: "):
        Tokenizer.from_dir(model_dir)
    edit(model_dir / "generation_config.json", lambda config: config.update(eos_token_id=[{}]))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id: expected a token id, found {}$"):
        Tokenizer.from_dir(model_dir)
