"""Text to token ids and back, over the `tokenizers` library: no torch, no transformers.

A `Tokenizer` comes from a Hugging Face directory, from a GGUF file, or is the built-in `ByteTokenizer`; all three are
saved in the same directory form. Chat templates are carried as text here and rendered in `cabochon.chat`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from string import ascii_lowercase
from typing import Any, SupportsIndex

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from cabochon.errors import UserError
from cabochon.files import encodable

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, kw_only=True)
class TemplateText:
    """A chat template and where it was read, for error messages."""

    text: str
    source: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """Vocabulary, merges, special tokens and chat templates of one model.

    Example: `tok = Tokenizer.from_dir("my-model"); tok.decode(tok.encode("Hello"))`.
    """

    core: tokenizers.Tokenizer
    special: Mapping[str, str]
    """role to token text, `{"bos_token": "<s>"}`; chat templates see these names"""
    eos_ids: tuple[int, ...]
    """every id that ends a completion; the tokenizer's own end token first"""
    templates: Mapping[str, TemplateText]
    """by name; `default`, and `tool_use` where the model ships one for tools"""
    config: Mapping[str, Any]
    """tokenizer_config.json without its chat template, kept so that a saved directory loses nothing"""
    source: str
    """directory or file it was read from, for error messages"""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """what generation_config.json says but for token ids (temperature, top_p), kept for the saved directory"""

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Read a Hugging Face directory: tokenizer.json, and what there is of tokenizer_config.json,
        special_tokens_map.json, chat_template.jinja, additional_chat_templates/ and generation_config.json.

        Raises:
            UserError: no tokenizer.json, a file that does not parse, or a special token outside the vocabulary.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            hint = "; only tokenizer.model is there: save it once with AutoTokenizer(...).save_pretrained"
            raise UserError(f"{file}: not found{hint if (path / 'tokenizer.model').is_file() else ''}")
        try:
            core = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception for a file it cannot read
            raise UserError(f"{file}: not readable by tokenizers {tokenizers.__version__}: {_line(error)}") from None
        # A tokenizer.json may ask for padding or cutting; neither may happen behind the caller's back.
        core.no_padding()
        core.no_truncation()
        config = _json(path / "tokenizer_config.json")
        _add_missing(core, config, path / "tokenizer_config.json")
        _add_listed(core, config, path / "tokenizer_config.json")
        roles = {k: v for k, v in (_json(path / "special_tokens_map.json") | config).items() if k in _ROLES}
        special: dict[str, Any] = {
            k: v.get("content") if isinstance(v, dict) else v for k, v in roles.items() if v is not None
        }
        ids = []
        for role, token in special.items():
            if not isinstance(token, str) or core.token_to_id(token) is None:
                raise UserError(f"{path / 'tokenizer_config.json'}: {role} {token!r} is not a token of {file.name}")
        # As transformers does: a token with a role is left out by decode(skip_special=True) whatever the file says.
        for role, token in special.items():
            _set_flags(core, token, roles[role] if isinstance(roles[role], dict) else {}, special=True)
        if "eos_token" in special:
            ids.append(core.token_to_id(special["eos_token"]))
        generation, model_file = _json(path / "generation_config.json"), "generation_config.json"
        more = generation.pop("eos_token_id", None)
        if more is None:
            model_file = "config.json"
            more = _json(path / model_file).get("eos_token_id")
        more = more if isinstance(more, list) else [more]
        if wrong := [i for i in more if not (i is None or type(i) is int)]:
            raise UserError(f"{path / model_file}: eos_token_id: expected a token id, found {wrong[0]!r:.60}")
        ids += more
        return cls(
            core=core,
            special=special,
            eos_ids=_unique(ids),
            templates=_templates(path, config),
            config={k: v for k, v in config.items() if k != "chat_template"},
            generation={k: v for k, v in generation.items() if not k.endswith("_token_id")},
            source=str(path),
        )

    @classmethod
    def from_gguf(cls, path: str | Path) -> Tokenizer:
        """The tokenizer inside a GGUF file. Raises UserError naming the file and the key it cannot use."""
        from cabochon.model.gguf_tokenizer import build  # imported late: it needs this module

        return build(path)

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids. Special tokens written in `text` become their ids; `add_special` adds what the model's
        post-processor puts around a text (usually a beginning-of-text token). Half of a surrogate pair is read as
        `?`: it may stand in JSON, and there are no bytes for it."""
        return self.core.encode(encodable(text), add_special_tokens=add_special).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and the `[start, end)` characters of `text` each came from, spaces included."""
        encoding = self._aligned.encode(encodable(text), add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[SupportsIndex] | np.ndarray, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. Ids outside the vocabulary give nothing."""
        return self.core.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_on(self, ids: Sequence[SupportsIndex] | np.ndarray, skip_special: bool = False) -> str:
        """As `decode`, of ids that follow a text: a space they begin with is there, whatever the decoder does."""
        if self._front is None:
            return self.decode(ids, skip_special)
        token, length = self._front
        return self.decode([token, *ids], skip_special)[length:]

    @property
    def drops_space(self) -> bool:
        """Does `decode` leave out the space that a text begins with? SentencePiece's decoders do."""
        return self._front is not None

    def id(self, token: str) -> int | None:
        return self.core.token_to_id(token)

    def token(self, id: int) -> str | None:
        return self.core.id_to_token(id)

    @property
    def bos_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def pad_id(self) -> int | None:
        return self._special_id("pad_token")

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id. A model's embedding may be larger, never smaller."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    def first_beyond(self, size: int) -> tuple[str, int] | None:
        """The token and its id at the lowest id that an embedding of `size` rows lacks; None where it has all."""
        vocab = self.core.get_vocab(with_added_tokens=True)
        return min(((token, i) for token, i in vocab.items() if i >= size), key=lambda item: item[1], default=None)

    def fingerprint(self) -> str:
        """64 hex digits over everything that decides ids and prompts: equal for a tokenizer saved and loaded again."""
        return self._fingerprint

    def first_difference(self, other: Tokenizer) -> tuple[int, str | None, str | None] | None:
        """`(id, token here, token there)` at the lowest id where the vocabularies differ, None where they are equal."""
        vocabs = (t.core.get_vocab(with_added_tokens=True) for t in (self, other))
        here, there = ({i: token for token, i in vocab.items()} for vocab in vocabs)
        for i in sorted(here.keys() | there.keys()):
            if here.get(i) != there.get(i):
                return i, here.get(i), there.get(i)
        return None

    def save(self, path: str | Path) -> None:
        """Write the directory form that `from_dir` and `transformers.AutoTokenizer` read.

        generation_config.json is written only where the directory has none yet.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / "tokenizer.json").write_text(self.core.to_str(pretty=True), encoding="utf-8")  # core.save hides OSError
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config, **self.special}
        _write_json(path / "tokenizer_config.json", config)
        _write_json(path / "special_tokens_map.json", dict(self.special))
        for name, template in self.templates.items():
            file = path / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
            file.parent.mkdir(exist_ok=True)
            file.write_text(template.text, encoding="utf-8", newline="")
        if not (path / "generation_config.json").exists():
            ids = {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos_ids) or None, "pad_token_id": self.pad_id}
            ids = {k: v for k, v in ids.items() if v is not None}
            _write_json(path / "generation_config.json", {**self.generation, **ids})

    def _special_id(self, role: str) -> int | None:
        return self.core.token_to_id(self.special[role]) if role in self.special else None

    @cached_property
    def _front(self) -> tuple[int, int] | None:
        """An ordinary token to decode in front of others, and its characters; None where the others need none."""
        spaced = [f"▁{letter}" for letter in ascii_lowercase]
        front, follower = (
            next((i for spelling in spellings if (i := self.id(spelling)) is not None), None)
            for spellings in ((*ascii_lowercase, *spaced), ("▁", *spaced))
        )
        if front is None or follower is None:
            return None
        alone, length = self.decode([follower]), len(self.decode([front]))
        return None if alone == self.decode([front, follower])[length:] else (front, length)

    @cached_property
    def _aligned(self) -> tokenizers.Tokenizer:
        """Equal ids, but untrimmed offsets: a byte-level post-processor drops the space of ` the` from its span."""
        if self.core.post_processor is None:
            return self.core
        out = copy.deepcopy(self.core)
        out.post_processor = None
        return out

    @cached_property
    def _fingerprint(self) -> str:
        state = json.loads(self.core.to_str())
        merges = state["model"].pop("merges", None) or []
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in merges]  # both spellings are in use
        ignored = {"version", "truncation", "padding"}
        parts = [
            {k: v for k, v in state.items() if k not in ignored},
            pairs,
            dict(self.special),
            list(self.eos_ids),
            {name: template.text for name, template in self.templates.items()},
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


_BYTE_SPECIALS = ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
"""ids 256 onwards; the two thinking tags are ordinary text to `decode(skip_special=True)`"""


_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""ChatML; the mask ends with the end-of-turn token, which is the last one a sampler draws."""


def byte_letters() -> list[str]:
    """The 256 printable letters byte-level vocabularies write bytes with (GPT-2's table): index = byte."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(b if b in plain else next(spare)) for b in range(256)]


def _byte_core() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(byte_letters())}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(t, special="think" not in t, normalized=False) for t in _BYTE_SPECIALS])
    return core


_BYTE_ROLES = {"bos_token": "<bos>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
_BYTE_TEMPLATE = TemplateText(text=_CHATML, source="the byte tokenizer's built-in chat template")
_BYTE_CONFIG = {"clean_up_tokenization_spaces": False, "model_max_length": 1 << 30}


@dataclass(frozen=True, kw_only=True, eq=False)
class ByteTokenizer(Tokenizer):
    """One token per byte (id = byte value) and a few special tokens: for models too small for a real vocabulary."""

    core: tokenizers.Tokenizer = field(default_factory=_byte_core)
    special: Mapping[str, str] = field(default_factory=_BYTE_ROLES.copy)
    eos_ids: tuple[int, ...] = (260, 258)
    templates: Mapping[str, TemplateText] = field(default_factory=lambda: {"default": _BYTE_TEMPLATE})
    config: Mapping[str, Any] = field(default_factory=_BYTE_CONFIG.copy)
    source: str = "the built-in byte tokenizer"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _unique(ids: Sequence[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {_line(error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _add_missing(core: tokenizers.Tokenizer, config: Mapping[str, Any], file: Path) -> None:
    """Add the tokens tokenizer_config.json lists beyond tokenizer.json, which must continue its ids. How it says that a
    token is matched (`lstrip`, ...) counts for those that are there too, as in transformers."""
    entries = config.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise UserError(f"{file}: added_tokens_decoder: expected an object of id to token, found {entries!r:.60}")
    for key, entry in entries.items():
        if not (key.isascii() and key.isdigit() and isinstance(entry, dict) and isinstance(entry.get("content"), str)):
            raise UserError(f"{file}: added_tokens_decoder: expected an id and an object with its text as content, "
                            f"found {key!r:.40}: {entry!r:.60}")  # fmt: skip
    for key, entry in sorted(entries.items(), key=lambda item: int(item[0])):
        text = entry["content"]
        _set_flags(core, text, entry)
        if core.token_to_id(text) != int(key):
            got = core.token_to_id(text)
            raise UserError(f"{file}: added_tokens_decoder gives {text!r} the id {key}, tokenizer.json makes it {got}")


def _add_listed(core: tokenizers.Tokenizer, config: Mapping[str, Any], file: Path) -> None:
    """Special tokens without a role. Those that the vocabulary lacks get the next ids, as in transformers."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        given = config.get(key) or []
        entries = list(given.values()) if isinstance(given, dict) else given
        if not isinstance(entries, list):
            raise UserError(f"{file}: {key}: expected tokens, found {given!r:.60}")
        for entry in entries:
            text = entry.get("content") if isinstance(entry, dict) else entry
            if not isinstance(text, str) or not text:
                raise UserError(f"{file}: {key}: expected tokens, found {entry!r:.60}")
            if isinstance(entry, dict):
                _set_flags(core, text, entry)
            elif core.token_to_id(text) is None:
                _set_flags(core, text, {}, special=True)


_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


def _set_flags(core: tokenizers.Tokenizer, text: str, given: Mapping[str, Any], **more: bool) -> None:
    """A token with the flags in `given`, else those it has; it is added where it is none yet."""
    there = next((t for t in core.get_added_tokens_decoder().values() if t.content == text), None)
    flags = {flag: getattr(there, flag) for flag in _FLAGS} if there else {"normalized": False}
    core.add_tokens([AddedToken(text, **flags | {k: bool(given[k]) for k in _FLAGS if k in given} | more)])


def template_name(name: str, where: str) -> str:
    """The name, which is to be a file's. Raises UserError for one that leads elsewhere."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"{where}: {name!r} cannot be a template's name; expected letters, digits, '-', '_' and '.'")
    return name


def _templates(path: Path, config: Mapping[str, Any]) -> dict[str, TemplateText]:
    """Chat templates by name. A chat_template.jinja wins over tokenizer_config.json, as in transformers."""
    file = path / "tokenizer_config.json"
    inline = config.get("chat_template") or {}
    if isinstance(inline, str):
        inline = {"default": inline}
    elif isinstance(inline, list) and all(isinstance(e, dict) and isinstance(e.get("name"), str) for e in inline):
        inline = {entry["name"]: entry.get("template") for entry in inline}
    if not isinstance(inline, dict) or not all(isinstance(text, str) for text in inline.values()):
        raise UserError(f"{file}: chat_template: expected text, or a list of objects with name and template")
    where = f"{file}: chat_template"
    out = {template_name(name, where): TemplateText(text=text, source=where) for name, text in inline.items()}
    files = {"default": path / "chat_template.jinja"}
    files |= {p.stem: p for p in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    for name, found in files.items():
        if found.is_file():
            try:  # bytes, since text mode would change line ends and with them the fingerprint
                out[name] = TemplateText(text=found.read_bytes().decode(), source=str(found))
            except UnicodeDecodeError as error:
                raise UserError(f"{found}: not UTF-8: {_line(error)}") from None
    return out
