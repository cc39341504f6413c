"""`data check` finds what is planted."""

import json

import numpy as np
import pytest

from cabochon.errors import UserError
from cabochon.sft.check import as_lines, check, histogram, marked
from cabochon.sft.config import SftConfig
from cabochon.testing import tiny_config
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Task

TOK = ByteTokenizer()


def config(place, train, held=(), **data):
    for name, examples in (("train", train), ("eval", held)):
        lines = [json.dumps({"prompt": p, "completion": c} if p else {"messages": [{"role": "user", "content": c}]})
                 for p, c in examples]  # fmt: skip
        (place / f"{name}.jsonl").write_text("\n".join(lines))
    return SftConfig.model_validate({
        "model": {"scratch": tiny_config(vocab_size=264)}, "step": {"sequence_length": 20, "batch_size": 2}, "steps": 1,
        "data": {"train": str(place / "train.jsonl"), "eval": [str(place / "eval.jsonl")] if held else [], **data},
    })  # fmt: skip


def test_what_is_planted_is_found(tmp_path):
    train = [("a+b", "c"), ("a+b", "c"), ("A + b", "d"), ("x" * 30, "y"), (None, "hello"), ("p q", "r")]
    report = check(config(tmp_path, train, held=[("P  q", "other"), ("new", "z")]), TOK)
    lines = [f.line for f in report.findings]
    where = str(tmp_path / "train.jsonl")
    assert not any("held-out" in line for line in lines)
    assert lines[0] == f"1 longer than 20 tokens (refused, data.too_long=error): {where}:4"
    assert any(line == f"1 without a token to learn: {where}:5" for line in lines)
    assert any(line == f"1 exact copies: {where}:2 = {where}:1" for line in lines)
    assert [leak.places for leak in report.leaks] == [(f"{tmp_path / 'eval.jsonl'}:1 = {where}:6",)]
    text = "\n".join(as_lines(report))
    assert "LEAK 1 held-out prompts are among the trained ones" in text
    assert "6 examples to train on (2 held out)" in text


def test_a_clean_file_has_nothing_to_complain_about(tmp_path):
    train = [(f"q{i}", "answer") for i in range(40)]
    report = check(config(tmp_path, train), TOK, rows=2)
    assert as_lines(report)[-1] == "nothing to complain about"
    assert (report.lengths == np.array([len(f"q{i}") + 7 for i in range(40)])).all()
    assert report.fill_packed > 0.9
    assert report.fill_padded == pytest.approx(report.lengths.mean() / 20)
    assert report.trained == 40 * 7
    assert len(report.sample) == 2


def test_shares_a_prompt_is_counted_without_the_copies(tmp_path):
    report = check(config(tmp_path, [("a", "b"), ("a", "b"), ("a", "c")]), TOK)
    assert [f.what for f in report.findings] == ["exact copies", "share a prompt with another but not its completion"]
    where = str(tmp_path / "train.jsonl")
    assert [f.places for f in report.findings] == [(f"{where}:2 = {where}:1",), (f"{where}:3 = {where}:1",)]


def test_held_out_rows_that_would_be_refused_are_found_too(tmp_path):
    report = check(config(tmp_path, [("a", "b")], held=[("x" * 30, "y"), (None, "hello")]), TOK)
    where = str(tmp_path / "eval.jsonl")
    assert [(f.what, f.places) for f in report.findings] == [
        ("held-out examples longer than 20 tokens (refused, data.too_long=error)", (f"{where}:1",)),
        ("held-out examples without a token to learn", (f"{where}:2",)),
    ]


def test_tasks_that_are_asked_must_not_be_trained_on_as_text_or_as_a_turn(tmp_path):
    tasks = [Task(id="t/0", prompt="1 + 1", verifier="math"), Task(id="t/1", prompt="other", verifier="math"),
             Task(id="t/2", prompt=[{"role": "user", "content": "2 + 2"}], verifier="math")]  # fmt: skip
    where = str(tmp_path / "train.jsonl")
    text = check(config(tmp_path, [("1  + 1", "2"), ("2 + 2", "4")]), TOK, tasks=tasks)
    assert [leak.line for leak in text.leaks] == [
        f"1 tasks of eval.sampled are among the trained prompts: t/0 = {where}:1"
    ]
    turns = check(config(tmp_path, [("1  + 1", "2"), ("2 + 2", "4")], chat=True), TOK, tasks=tasks)
    assert [leak.places for leak in turns.leaks] == [(f"t/0 = {where}:1", f"t/2 = {where}:2")]


def test_where_every_row_is_held_out_there_is_nothing_to_check(tmp_path):
    with pytest.raises(UserError, match="every row is held out, none is left to train on"):
        check(config(tmp_path, [("a", "b")], eval_fraction=0.999999), TOK)


def test_a_row_that_cannot_be_read_is_an_error_here_too(tmp_path):
    cfg = config(tmp_path, [("a", "b")])
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl:1: expected a column"):
        check(cfg, TOK)


def test_the_trained_tokens_are_marked(tmp_path):
    report = check(config(tmp_path, [("1+1=", "2")]), TOK)
    assert marked(report.sample[0], TOK, on="[", off="]") == "1+1=[2<|im_end|>]"


def test_a_histogram_counts_everything_once():
    lengths = np.array([1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89])
    lines = histogram(lengths)
    assert len(lines) == 10
    assert sum(int(line.rsplit(" ", 1)[1]) for line in lines) == 11
    assert len(histogram(np.array([4, 4, 4]))) == 1
