"""Tokens, masks, cutting, packing, and the place in the data."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from cabochon.data import Chat, Plain
from cabochon.errors import UserError
from cabochon.ops import has_target
from cabochon.sft.config import DataConfig
from cabochon.sft.data import Counts, Encoded, Feed, Position, Split, encode, encode_split, fit, pack, read_splits
from cabochon.tokenizer import ByteTokenizer, TemplateText

TOK = ByteTokenizer()
ASK, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
DATA = DataConfig(train="unused.jsonl")


def trained(encoded):
    """The text of the trained tokens."""
    return TOK.decode(encoded.ids[encoded.mask])


def test_the_assistants_turns_of_a_conversation_are_trained_with_their_end():
    chat = Chat(where="x", messages=(ASK, ANSWER, ASK, {"role": "assistant", "content": "bye"}))
    assert trained(encode(chat, TOK)) == "yo<|im_end|>bye<|im_end|>"
    assert encode(chat, TOK, train_on="all").mask.tolist() == [False] + [True] * (len(encode(chat, TOK).ids) - 1)


def test_assistant_turns_of_the_prompt_are_context():
    chat = Chat(where="x", messages=(ASK, ANSWER, ASK, {"role": "assistant", "content": "bye"}), context=3)
    assert trained(encode(chat, TOK)) == "bye<|im_end|>"


def test_tools_are_in_the_tokens():
    template = "{{ tools[0].name }}{% generation %}{{ messages[0].content }}{% endgeneration %}"
    tok = replace(TOK, templates={"default": TemplateText(text=template, source="t")})
    chat = Chat(where="x", messages=(ANSWER,), tools=({"name": "add"},))
    assert tok.decode(encode(chat, tok).ids) == "addyo"


def test_plain_text_ends_and_its_prompt_is_not_trained():
    encoded = encode(Plain(where="x", prompt="1+1=", completion="2"), TOK)
    assert TOK.decode(encoded.ids) == "1+1=2<|im_end|>"
    assert trained(encoded) == "2<|im_end|>"
    text = encode(Plain(where="x", prompt="", completion="abc"), TOK)
    assert trained(text) == "bc<|im_end|>", "the first token has no log-prob"


def test_beginning_of_text_where_the_tokenizer_adds_it():
    from tokenizers import processors

    tok = ByteTokenizer()
    tok.core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 257), ("<eos>", 258)]
    )
    encoded = encode(Plain(where="x", prompt="a", completion="b"), tok)
    assert encoded.ids.tolist() == [257, 97, 98, 260]
    assert encoded.mask.tolist() == [False, False, True, True]
    assert encode(Plain(where="x", prompt="", completion="b"), tok).ids.tolist() == [257, 98, 260]


def test_a_template_that_cannot_tell_names_the_row():
    tok = replace(TOK, templates={"default": TemplateText(text="{{ messages[-1].content }}", source="t.jinja")})
    with pytest.raises(UserError, match=r"f\.jsonl:3: t\.jinja: the chat template "):
        encode(Chat(where="f.jsonl:3", messages=(ASK, ANSWER, ASK, ANSWER)), tok)
    with pytest.raises(UserError, match=r"f\.jsonl:3: .*has no end-of-text token"):
        encode(Plain(where="f.jsonl:3", prompt="a", completion="b"), replace(TOK, eos_ids=()))


def made(n, trained_from=1, where="x"):
    return Encoded(where=where, ids=np.arange(n, dtype=np.int32), mask=np.arange(n) >= trained_from)


def test_what_is_too_long():
    assert fit(made(8), 8, "error").lost == 0
    assert fit(made(9), 8, "drop") is None
    left, right = fit(made(9), 8, "left"), fit(made(9), 8, "right")
    assert (left.ids.tolist(), left.lost) == (list(range(1, 9)), 1)
    assert (right.ids.tolist(), right.lost) == (list(range(8)), 1)
    assert not left.mask[0]
    with pytest.raises(UserError, match=r"f\.jsonl:4: 9 tokens, step\.sequence_length is 8; raise it, or set data"):
        fit(made(9, where="f.jsonl:4"), 8, "error")


def texts(*pairs):
    return [Plain(where=f"f.jsonl:{i}", prompt=p, completion=c) for i, (p, c) in enumerate(pairs, 1)]


def test_everything_that_happens_to_an_example_is_counted():
    examples = texts(("a", "b"), ("a" * 9, "b"), ("ab", "c" * 9), ("a", "bc"))
    examples.append(Chat(where="f.jsonl:5", messages=(ASK,)))
    right = encode_split([examples], [1.0], TOK, DATA.model_copy(update={"too_long": "right", "empty": "drop"}), 8)
    assert right.counts.examples == 3
    assert (right.counts.truncated, right.counts.dropped_long, right.counts.dropped_empty) == (1, 0, 2)
    assert (right.counts.tokens, right.counts.trained_tokens) == (3 + 8 + 4, 2 + 6 + 3)
    drop = encode_split([examples], [1.0], TOK, DATA.model_copy(update={"too_long": "drop", "empty": "drop"}), 8)
    assert (drop.counts.examples, drop.counts.dropped_long, drop.counts.dropped_empty) == (2, 2, 1)
    with pytest.raises(UserError, match=r"f\.jsonl:5: no token to learn: there is no assistant turn"):
        encode_split([examples[3:]], [1.0], TOK, DATA, 64)


def test_no_usable_row(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "aaaaaaaaaa", "completion": "b"}\n')
    cfg = DataConfig(train=str(file), too_long="drop")
    with pytest.raises(UserError, match=r"data\.train: no usable row \(1 were too long, 0 had no token"):
        read_splits(cfg, TOK, 8)
    for share, key in ((1e-9, "data.eval and data.eval_fraction"), (1 - 1e-9, "data.train")):
        said = rf"{key}: no usable row \(no prompt fell on this side of data\.eval_fraction={share:g}; set another"
        with pytest.raises(UserError, match=said):
            read_splits(DataConfig(train=str(file), eval_fraction=share), TOK, 64)


def test_weights_that_leave_an_epoch_without_a_row(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 5)
    with pytest.raises(UserError, match=r"data\.train: its weights leave an epoch without a row \(0\.1 x 5\); raise"):
        read_splits(DataConfig(train=[{"path": str(file), "weight": 0.1}]), TOK, 8)


def test_held_out_prompts_that_are_trained_on_are_counted(tmp_path):
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    train.write_text('{"prompt": "a b", "completion": "c"}\n{"prompt": "d", "completion": "e"}\n')
    held.write_text('{"prompt": "A  B ", "completion": "x"}\n{"prompt": "new", "completion": "e"}\n')
    train_split, held_split = read_splits(DataConfig(train=str(train), eval=str(held)), TOK, 64)
    assert (train_split.counts.leaked, held_split.counts.leaked) == (0, 1)


def split_of(lengths, sizes=None, weights=None):
    examples = [made(n) for n in lengths]
    return Split(examples=examples, sizes=sizes or (len(lengths),), weights=weights or (1.0,), counts=Counts())


def test_the_oracle_of_packing():
    """algorithms.md section 2; there the mask stands at the token that predicts, here at the one that is predicted."""
    a = Encoded(where="a", ids=np.array([5, 6, 7], np.int32), mask=np.array([0, 0, 1], bool))
    b = Encoded(where="b", ids=np.array([8, 9], np.int32), mask=np.array([0, 1], bool))
    feed = Feed(split=Split(examples=[a, b], sizes=(2,), weights=(1.0,), counts=Counts()), batch_size=1, length=6,
                packing=True, seed=0)  # fmt: skip
    batch = feed.all_once()[0]
    assert batch.segment_BT.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert batch.position_BT.tolist() == [[0, 1, 2, 0, 1, 0]]
    at_predictor = np.roll(batch.mask_BT, -1, axis=1)
    assert at_predictor.tolist() == [[0, 1, 0, 1, 0, 0]]
    assert np.roll(np.asarray(has_target(jnp.asarray(batch.segment_BT))), -1, axis=1).tolist() == [[1, 1, 0, 1, 0, 0]]


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_comes_up_once_an_epoch_and_epochs_follow_without_a_gap(packing):
    rng = np.random.default_rng(0)
    split = split_of(rng.integers(2, 17, 101).tolist())
    feed = Feed(split=split, batch_size=4, length=16, packing=packing, seed=1)
    rows = len(feed.rows(0)) + len(feed.rows(1))
    position, seen, batches = Position(), [], 0
    while position.epoch < 2:
        batch, examples, position = feed.take(position)
        assert batch.tokens_BT.shape == (4, 16)
        assert (batch.segment_BT != 0).sum() == sum(len(e.ids) for e in examples)
        seen += [id(e) for e in examples]
        batches += 1
    assert batches == -(-rows // 4)
    first = seen[: 2 * 101]
    assert all(first.count(id(e)) == 2 for e in split.examples)
    if packing:
        assert sum(len(e.ids) for e in split.examples) / (len(feed.rows(0)) * 16) > 0.9
    else:
        assert all(len(row) == 1 for row in feed.rows(0))


def test_a_batch_is_a_function_of_its_place():
    split = split_of([3, 5, 7, 9, 4, 6] * 5)
    walk, position = [], Position()
    feed = Feed(split=split, batch_size=3, length=16, packing=True, seed=7)
    for _ in range(12):
        walk.append((position, feed.take(position)))
        position = walk[-1][1][2]
    assert position.epoch >= 3
    for place, (batch, _, following) in reversed(walk):
        again = Feed(split=split, batch_size=3, length=16, packing=True, seed=7).take(place)
        np.testing.assert_array_equal(again[0].tokens_BT, batch.tokens_BT)
        assert again[2] == following
    other = Feed(split=split, batch_size=3, length=16, packing=True, seed=8).take(Position())
    assert not np.array_equal(other[0].tokens_BT, walk[0][1][0].tokens_BT)


def test_evaluation_sees_every_example_once_and_fills_up_with_empty_rows():
    split = split_of([9, 9, 9, 4, 5])
    feed = Feed(split=split, batch_size=4, length=10, packing=True, seed=0, pad_id=256)
    (batch,) = feed.all_once()
    assert (batch.segment_BT != 0).sum(axis=1).tolist().count(0) == 0
    assert (batch.segment_BT != 0).sum() == 36
    two = Feed(split=split, batch_size=3, length=10, packing=True, seed=0, pad_id=256).all_once()
    assert [(b.segment_BT != 0).any(axis=1).sum() for b in two] == [3, 1]
    assert (two[1].tokens_BT[1:] == 256).all()


def test_windows_of_the_order_are_packed():
    split = split_of([8] * 2048)
    rows = pack(split, np.arange(2048), 16, True)
    assert len(rows) == 1024
    assert max(max(row) for row in rows[:512]) < 1024
