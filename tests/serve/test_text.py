"""Tokens' places in a text, and how long a token can be."""

import tokenizers
from tokenizers import AddedToken, decoders, models

from cabochon.serve.text import Pieces
from cabochon.tokenizer import ByteTokenizer, Tokenizer


def sentencepiece():
    core = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["▁", "a", "b", "▁a", "▁b", "▁▁"])},
                                           merges=[]))  # fmt: skip
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.add_tokens([AddedToken("<s>", special=True)])
    return Tokenizer(core=core, special={}, eos_ids=(), templates={}, config={}, source="test")


def test_places_where_the_decoder_drops_the_first_space():
    pieces, (bos, a, b, two) = Pieces(sentencepiece()), (6, 3, 4, 5)
    assert list(pieces.offsets([a, b], "a b", begins=True)) == [0, 1]
    assert list(pieces.offsets([bos, a, b], "a b", begins=True)) == [0, 0, 1]
    assert list(pieces.offsets([two, a, b], "  a b", begins=True)) == [0, 1, 3]
    assert list(pieces.offsets([a, b], " a b", begins=False)) == [0, 2]


def test_special_tokens_have_a_place_where_they_are_written():
    pieces, tok = Pieces(ByteTokenizer()), ByteTokenizer()
    written = tok.encode("<|im_start|>hi")
    assert list(pieces.offsets(written, "<|im_start|>hi", begins=True)) == [0, 12, 13]
    assert list(pieces.offsets(written, "hi", begins=False)) == [0, 0, 1]
    assert list(pieces.offsets(tok.encode(" é"), " é", begins=True)) == [0, 1, 1]


def test_the_longest_token():
    assert Pieces(ByteTokenizer()).longest == len("<|im_start|>")
    assert Pieces(sentencepiece()).longest == 4
