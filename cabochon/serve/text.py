"""Tokens as the API's texts: what of a stream can be shown, a token's bytes, thinking apart from the rest."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from cabochon.tokenizer import Tokenizer, byte_letters


def safe_length(text: str, held: Sequence[str]) -> int:
    """Characters of a growing text that no further token can take back: all but half a character at its end, and what
    may turn out to be the beginning of one of the `held` texts (stop strings, tags)."""
    end = len(text.rstrip("\ufffd"))
    return min((end - _begun(text[:end], each) for each in held), default=end)


def _begun(text: str, whole: str) -> int:
    """The length of the longest end of `text` that `whole` begins with, but for all of it."""
    return next((k for k in range(min(len(whole) - 1, len(text)), 0, -1) if text.endswith(whole[:k])), 0)


class Parts(NamedTuple):
    """A completion's text."""

    reasoning: str | None
    """between the tags; None where nothing was thought"""
    content: str


def split_thinking(text: str, open: str, close: str, *, begun: bool) -> Parts:
    """Apart by the tags, which are left out. `begun`: the prompt ended with the open tag. As more is appended to
    `text`, both parts only grow, but for a tag that is half there."""
    before, rest = "", text
    if not begun:
        before, found, rest = text.partition(open)
        if not found:
            return Parts(None, text)
    reasoning, _, after = rest.partition(close)
    return Parts(reasoning, before + after)


class Pieces:
    """A vocabulary's tokens as bytes and as the strings the API shows."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._letters = {letter: byte for byte, letter in enumerate(byte_letters())}
        self._added = tokenizer.core.get_added_tokens_decoder()
        decoder = json.loads(tokenizer.core.to_str()).get("decoder") or {}
        kinds = [decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))]
        self._spelt: Callable[[str], bytes] = self._byte_level if "ByteLevel" in kinds else _sentence_piece
        self.longest = max(4, max(len(self.bytes_of(token)) for token in range(tokenizer.vocab_size)))
        """bytes of one token at most; 4 for a character that no token spells"""

    def bytes_of(self, token: int) -> bytes:
        """Of ids outside the vocabulary none."""
        if token in self._added:
            return self._added[token].content.encode()
        spelling = self._tokenizer.token(token)
        return b"" if spelling is None else self._spelt(spelling)

    def string(self, token: int) -> str:
        r"""The token's text; where its bytes are no text by themselves, `bytes:\xe2\x82`, as OpenAI writes it."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def offsets(self, tokens: Sequence[int], text: str, *, begins: bool) -> Iterator[int]:
        """Characters of `text` before each of its tokens. Special tokens have a place in it where a client wrote them.
        `begins`: the first token begins a text, and its space may be dropped."""
        decoder, at = codecs.getincrementaldecoder("utf-8")("replace"), 0
        dropping = begins and self._tokenizer.drops_space
        for token in tokens:
            yield at
            if token in self._added and self._added[token].special:
                content = self._added[token].content
                at += len(content) if text.startswith(content, at) else 0
            else:
                piece = decoder.decode(self.bytes_of(token))
                at += len(piece) - (dropping and piece.startswith(" "))
                dropping = False

    def _byte_level(self, spelling: str) -> bytes:
        return bytes(self._letters[letter] for letter in spelling if letter in self._letters)


def _sentence_piece(spelling: str) -> bytes:
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", spelling):
        return bytes([int(byte[1], 16)])
    return spelling.replace("\u2581", " ").encode()
