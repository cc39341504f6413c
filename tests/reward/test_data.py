"""Preference rows: every form and every mistake; pairs stay together, prompts too; the order is a function."""

import json
from collections import Counter

import numpy as np
import pytest

from cabochon.data import Row
from cabochon.errors import UserError
from cabochon.reward.config import PreferenceColumns, PreferenceData
from cabochon.reward.data import Feed, Position, batch_of, encode, pair_of, preference_of, read_splits
from cabochon.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "yes"), ("assistant", "no")))


def read(**values):
    return preference_of(Row(where="f.jsonl:3", values=values))


def texts(pair):
    return BYTES.decode(pair.chosen), BYTES.decode(pair.rejected)


def test_text_with_a_prompt():
    row = read(prompt="q: ", chosen="yes", rejected="no", margin=0.5)
    pair = pair_of(row, BYTES)
    assert texts(pair) == ("q: yes<|im_end|>", "q: no<|im_end|>")
    assert pair.margin == 0.5


def test_text_without_a_prompt_column_shares_whole_words():
    row = read(chosen="Who? Sir Ada", rejected="Who? Sir Alan")
    assert (row.prompt, row.chosen, row.rejected) == ("Who? Sir", " Ada", " Alan")


def test_conversations_with_and_without_a_prompt_column():
    whole = read(chosen=[USER, GOOD], rejected=[USER, BAD])
    parts = read(prompt=[USER], chosen=[GOOD], rejected=[BAD])
    assert texts(pair_of(whole, BYTES)) == texts(pair_of(parts, BYTES))
    assert texts(pair_of(parts, BYTES))[0] == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    as_chat = pair_of(read(prompt="q", chosen="yes", rejected="no"), BYTES, chat=True)
    assert texts(as_chat) == texts(pair_of(parts, BYTES))


def test_text_after_messages_is_what_the_assistant_says():
    """`cabochon rm sample` and `rm rows` write such rows where tasks have messages."""
    parts = pair_of(read(prompt=[USER], chosen=[GOOD], rejected=[BAD]), BYTES)
    assert texts(pair_of(read(prompt=[USER], chosen="yes", rejected="no"), BYTES)) == texts(parts)
    good = pair_of(read(prompt=[USER], completion="yes", label=True), BYTES)
    assert texts(good) == (texts(parts)[0], "")


def test_labels_without_a_partner():
    good, bad = read(prompt="q", completion="yes", label=True), read(prompt="q", completion="no", label=False)
    assert texts(pair_of(good, BYTES)) == ("qyes<|im_end|>", "")
    assert texts(pair_of(bad, BYTES)) == ("", "qno<|im_end|>")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prompt": "q", "chosen": "a"}, "no column 'rejected'"),
        ({"prompt": "q", "completion": "a"}, "no column 'chosen': expected 'chosen' and 'rejected', or 'prompt'"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' are equal"),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, "'rejected': expected text or a list of messages, got 3"),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, "'prompt' is text and 'chosen' is messages"),
        ({"prompt": "q", "chosen": "a", "rejected": [BAD]}, "'chosen' is text and 'rejected' is messages"),
        ({"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": [BAD]}, "'chosen': expected text or a list"),
        ({"chosen": "yes", "rejected": "no"}, "do not begin with the same prompt"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "do not begin with the same prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "big"}, "'margin': expected a number, got 'big'"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": float("nan")}, "'margin': expected a number"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 10**400}, "'margin': expected a number, got 100"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": -1e39}, "'margin': expected a number, got -1e+39"),
        ({"prompt": "q", "completion": "a", "label": "good"}, "'label': expected true or false, got 'good'"),
    ],
)
def test_bad_rows_name_the_line_and_the_column(values, said):
    with pytest.raises(UserError, match=r"f\.jsonl:3: ") as caught:
        read(**values)
    assert said in str(caught.value)


def test_a_prompt_column_of_another_name_is_called_by_it():
    row = Row(where="f.jsonl:3", values={"chosen": "yes", "rejected": "no"})
    with pytest.raises(UserError, match=r"f\.jsonl:3: no column 'question', and the two answers do not begin"):
        preference_of(row, PreferenceColumns(prompt="question"))


def test_one_token_is_refused():
    """Its place in a batch would be its own end and the beginning at once."""
    with pytest.raises(UserError, match=r"f\.jsonl:3: prompt and answer are one token \(260\)"):
        pair_of(read(prompt="", chosen="", rejected="x"), BYTES)


def test_texts_that_differ_but_not_in_their_tokens_are_refused():
    with pytest.raises(UserError, match="the same tokens"):
        pair_of(read(prompt="q", chosen="a<|im_end|>", rejected="a<eos>"), _Ends())


class _Ends(ByteTokenizer):
    """Leaves the ends of texts out, as a tokenizer with a normaliser may."""

    def encode(self, text, add_special=False):
        return super().encode(text.replace("<|im_end|>", "").replace("<eos>", ""), add_special)


def test_an_answer_that_was_cut_off_has_no_end():
    assert BYTES.decode(encode("q", "a", BYTES, ended=False)) == "qa"
    assert BYTES.decode(encode("q", "a", BYTES, chat=True, ended=False)).endswith("assistant\na")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made(tmp_path, rows, *, length=32, batch=4, **settings):
    cfg = PreferenceData.model_validate({"train": write(tmp_path / "rows.jsonl", rows), **settings})
    return cfg, *read_splits(cfg, BYTES, length, batch)


def rows_of(prompts, answers=2):
    return [
        {"prompt": f"p{i}", "chosen": f"good{k}", "rejected": f"bad{k}"} for i in range(prompts) for k in range(answers)
    ]


def test_pairs_of_one_prompt_are_one_group_and_no_prompt_is_on_both_sides(tmp_path):
    _, train, held = made(tmp_path, rows_of(40), eval_fraction=0.3)
    assert {len(group) for group in train.groups} == {2}
    prompts = [{pair.prompt for pair in split.pairs} for split in (train, held)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[0]) + len(prompts[1]) == 40
    assert 3 < len(prompts[1]) < 22
    _, fewer, _ = made(tmp_path, rows_of(5, 3), max_prompt_pairs=1)
    assert {len(group) for group in fewer.groups} == {1}
    assert fewer.dropped == 10


def test_a_prompt_that_was_held_out_may_not_be_trained_on(tmp_path):
    held = write(tmp_path / "held.jsonl", [{"prompt": "P0 ", "chosen": "x", "rejected": "y"}])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: its prompt is among the held-out rows too"):
        made(tmp_path, rows_of(3), eval=held)


def test_too_long_is_refused_or_left_out_never_cut(tmp_path):
    rows = [*rows_of(2), {"prompt": "p" * 40, "chosen": "a", "rejected": "b"}]
    with pytest.raises(UserError, match=r"rows.jsonl:5: the two answers .* have 84 tokens, step.sequence_length is 32"):
        made(tmp_path, rows)
    _, train, _ = made(tmp_path, rows, too_long="drop")
    assert (len(train.pairs), train.dropped) == (4, 1)
    with pytest.raises(UserError, match=r"data.train: no usable pair \(1 were longer than 32 tokens\)"):
        made(tmp_path, rows[-1:], too_long="drop")


def test_weights_that_leave_an_epoch_empty_are_refused(tmp_path):
    source = {"path": write(tmp_path / "rows.jsonl", rows_of(20)), "weight": 0.01}
    with pytest.raises(UserError, match=r"its weights leave an epoch without a prompt \(0\.01 x 20\); raise them"):
        read_splits(PreferenceData.model_validate({"train": [source]}), BYTES, 32, 4)


@pytest.mark.parametrize(("share", "key"), [(1e-9, "data.eval and data.eval_fraction"), (1 - 1e-9, "data.train")])
def test_a_share_that_takes_no_prompt_or_all_is_said(tmp_path, share, key):
    with pytest.raises(UserError, match=rf"{key}: no usable pair \(no prompt fell on this side of data.eval_fraction="):
        made(tmp_path, rows_of(5), eval_fraction=share)


def feed_of(train, packing=True, seed=0):
    return Feed(split=train, batch_size=4, length=32, packing=packing, seed=seed)


def test_every_pair_comes_once_an_epoch_and_those_of_a_prompt_together(tmp_path):
    _, train, _ = made(tmp_path, rows_of(20))
    for packing in (True, False):
        feed, position = feed_of(train, packing), Position()
        seen: list[str] = []
        while position.epoch == 0:
            batch, rows, after = feed.take(position)
            assert batch.tokens_BT.shape == (4, 32)
            of_batch = [pair for row in rows for pair in row]
            assert packing or max(map(len, rows)) == 1
            for prompt in {pair.prompt for pair in of_batch}:
                assert sum(pair.prompt == prompt for pair in of_batch) == 2
            seen += [pair.where for pair in of_batch]
            position = after
        times = Counter(seen)  # the last batch holds the beginning of the next epoch as well
        assert times.keys() == {pair.where for pair in train.pairs}
        assert sum(n - 1 for n in times.values()) == 2 * position.group
        assert max(times.values()) <= 2


def test_the_order_is_a_function_of_seed_and_position(tmp_path):
    _, train, _ = made(tmp_path, rows_of(20))

    def sequence(feed, position, n):
        out = []
        for _ in range(n):
            batch, _, position = feed.take(position)
            out.append(np.asarray(batch.tokens_BT).tolist())
        return out, position

    whole, _ = sequence(feed_of(train), Position(), 30)
    begun, position = sequence(feed_of(train), Position(), 13)
    rest, _ = sequence(feed_of(train), position, 17)
    assert begun + rest == whole
    assert sequence(feed_of(train, seed=1), Position(), 1)[0] != whole[:1]


def test_evaluation_sees_every_pair_once(tmp_path):
    _, train, _ = made(tmp_path, rows_of(9))
    found = [pair.where for _, rows in feed_of(train).all_once() for row in rows for pair in row]
    assert sorted(found) == sorted(pair.where for pair in train.pairs)


def test_a_group_that_fills_more_than_a_batch_is_taken_in_parts(tmp_path):
    _, train, _ = made(tmp_path, rows_of(1, 9))
    assert sum(map(len, train.groups)) == 9
    assert len(train.groups) > 1
    for _ in range(5):
        feed_of(train).take(Position())


def test_a_lone_good_answer_keeps_its_margin_and_its_place():
    pair = pair_of(read(prompt="q", completion="a", label=False), BYTES)
    batch = batch_of([[pair, pair]], 16)
    assert batch.segment_BT[0].tolist()[:6] == [2, 2, 2, 4, 4, 4]
    assert batch.mask_BT[0].tolist()[:6] == [0, 0, -1, 0, 0, -1]
