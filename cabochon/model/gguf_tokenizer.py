"""The tokenizer inside a GGUF file, rebuilt for the `tokenizers` library.

GGUF stores tokens, merges or scores, and the *name* of the pre-tokenizer; what each name splits is fixed in llama.cpp
(src/llama-vocab.cpp) and restated here as the patterns of the models' own tokenizer.json files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from cabochon.errors import UserError
from cabochon.model.gguf_file import Header, read_header
from cabochon.tokenizer import TemplateText, Tokenizer, template_name

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

_SPLITS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "jais", "roberta-bpe"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
}
"""`tokenizer.ggml.pre` to the patterns that cut a text, one after the other; each match becomes its own piece"""
_WHOLE_WORDS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"})
"""a piece that is a token is taken whole, whatever the merges say; they begin with BOS unless the file says not"""
_CONTROL, _USER_DEFINED, _UNKNOWN = 3, 4, 2
_TEMPLATE = "tokenizer.chat_template"


def build(path: str | Path) -> Tokenizer:
    """The Tokenizer of a GGUF file; byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`) are known.

    Raises:
        UserError: as `read_header`; a tokenizer key that is missing or has a value not known here.
    """
    header = read_header(path)
    meta = header.metadata
    tokens = _list(header, "tokenizer.ggml.tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise UserError(f"{path}: tokenizer.ggml.tokens lists {twice!r} twice")
    kind = meta.get("tokenizer.ggml.model")
    if kind == "gpt2":
        core, add_bos = _byte_level(header, vocab)
    elif kind == "llama":
        core, add_bos = _sentencepiece(header, vocab), True
    else:
        raise UserError(f"{path}: tokenizer.ggml.model={kind!r} is not known here; known are 'gpt2' and 'llama'")
    types = _list(header, "tokenizer.ggml.token_type", len(tokens))
    core.add_tokens(
        [
            AddedToken(token, special=type_ != _USER_DEFINED, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (_CONTROL, _USER_DEFINED, _UNKNOWN)
        ]
    )
    ids = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {role: _id(header, name, len(tokens)) for role, name in ids.items()}
    special = {role: tokens[i] for role, i in found.items() if i is not None}
    add_bos = meta.get("tokenizer.ggml.add_bos_token", add_bos) and "bos_token" in special
    if add_bos:
        bos = special["bos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    ends = [_id(header, name, len(tokens)) for name in ("eos", "eot", "eom")]
    arch = meta.get("general.architecture")
    return Tokenizer(
        core=core,
        special=special,
        eos_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        templates={
            template_name(key.removeprefix(_TEMPLATE).lstrip(".") or "default", f"{path}: {key}"): TemplateText(
                text=text, source=f"{path}: {key}"
            )
            for key, text in meta.items()
            if isinstance(text, str) and (key == _TEMPLATE or key.startswith(_TEMPLATE + "."))
        },
        config={
            "add_bos_token": bool(add_bos),
            "clean_up_tokenization_spaces": False,
            "model_max_length": meta.get(f"{arch}.context_length", 1 << 30),
        },
        source=str(path),
    )


def _list(header: Header, key: str, length: int | None = None) -> list[Any]:
    value = header.metadata.get(key)
    if not isinstance(value, list):
        raise UserError(f"{header.path}: metadata key {key} is missing; the file has no tokenizer this reader can use")
    if length not in (None, len(value)):
        got = f"{len(value):,} entries, expected {length:,}"
        raise UserError(f"{header.path}: metadata key {key} has {got}, one per token")
    return value


def _id(header: Header, name: str, n_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = header.metadata.get(key)
    if value is not None and not (isinstance(value, int) and 0 <= value < n_tokens):
        raise UserError(f"{header.path}: metadata key {key} is {value!r}, expected a token id below {n_tokens:,}")
    return value


def _byte_level(header: Header, vocab: dict[str, int]) -> tuple[tokenizers.Tokenizer, bool]:
    """GPT-2 style BPE over bytes; also whether it begins with BOS where the file does not say."""
    name = str(header.metadata.get("tokenizer.ggml.pre", "default"))
    if name not in _SPLITS:
        known = ", ".join(_SPLITS)
        raise UserError(f"{header.path}: tokenizer.ggml.pre={name!r} is not known here; known are {known}")
    merges = [tuple(str(merge).split(" ", 1)) for merge in _list(header, "tokenizer.ggml.merges")]
    core = _bpe(header, vocab, merges, ignore_merges=name in _WHOLE_WORDS)
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS[name]]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
    core.decoder = decoders.ByteLevel()
    return core, name in _WHOLE_WORDS


def _sentencepiece(header: Header, vocab: dict[str, int]) -> tokenizers.Tokenizer:
    """SentencePiece BPE: spaces are `▁`, what is not in the vocabulary is spelled in bytes.

    SentencePiece joins the neighbours whose union scores highest, so the merges are every split of every token into
    two tokens, best score first.
    """
    scores = _list(header, "tokenizer.ggml.scores", len(vocab))
    merges = []
    for token, i in vocab.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += [(-scores[i], i, pair) for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    merges.sort(key=lambda m: (m[0], m[1]))
    core = _bpe(header, vocab, [pair for _, _, pair in merges], byte_fallback=True, fuse_unk=True)
    prefix = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return core


def _bpe(
    header: Header,
    vocab: dict[str, int],
    merges: list[Any],
    *,
    ignore_merges: bool = False,
    byte_fallback: bool = False,
    fuse_unk: bool = False,
) -> tokenizers.Tokenizer:
    unknown = _id(header, "unknown", len(vocab)) if byte_fallback else None
    try:
        model = models.BPE(
            vocab=vocab,
            merges=merges,
            ignore_merges=ignore_merges,
            byte_fallback=byte_fallback,
            fuse_unk=fuse_unk,
            unk_token=next((token for token, i in vocab.items() if i == unknown), None),
        )
    except Exception as error:  # tokenizers raises plain Exception, for a merge of tokens that do not exist
        reason = " ".join(str(error).split())
        raise UserError(f"{header.path}: tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: {reason}") from None
    return tokenizers.Tokenizer(model)
