"""Rows of every kind out of every kind of file, mistakes by file and line, and an order that needs no memory."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.config import ColumnsConfig, SourceConfig
from cabochon.data import (
    Chat,
    Plain,
    Row,
    epoch_order,
    example_of,
    prompt_key,
    read_examples,
    read_rows,
    split_held_out,
)
from cabochon.errors import UserError

ROWS = [{"prompt": "1+1=", "completion": "2"}, {"text": "a\u2028b"}]
USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def write_jsonl(path):
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")


def write_json(path):
    path.write_text(json.dumps(ROWS))


def write_parquet(path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"text": row.get("text") or row["prompt"]} for row in ROWS]), path)


def write_dataset(path):
    import datasets

    datasets.Dataset.from_list([{"text": row.get("text") or row["prompt"]} for row in ROWS]).save_to_disk(str(path))


@pytest.mark.parametrize(
    ("name", "write", "second"),
    [("a.jsonl", write_jsonl, "a.jsonl:3"), ("a.json", write_json, "a.json[1]"),
     ("a.parquet", write_parquet, "a.parquet[1]"), ("folder", write_dataset, "folder[1]")],
)  # fmt: skip
def test_every_kind_of_file(tmp_path, name, write, second):
    write(tmp_path / name)
    rows = read_rows(tmp_path / name)
    assert len(rows) == 2
    assert rows[1].where == str(tmp_path / second)
    assert rows[1].values["text"] == "a\u2028b"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a\.jsonl:2: expected a JSON object, got list"),
        ("a.jsonl", "\n\n", r"a\.jsonl: holds no rows"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.json", '{"text": "x"}', r"a\.json: expected a list of objects, got dict"),
        ("a.json", "nope", r"a\.json: not JSON"),
        ("a.parquet", "nope", r"a\.parquet: not a parquet file"),
        ("a.csv", "x", r"a\.csv: expected a file ending in \.jsonl"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        read_rows(tmp_path / name)


def test_a_file_that_is_not_there_or_not_readable(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        read_rows(tmp_path / "gone.jsonl")
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="plain: not a dataset written by save_to_disk"):
        read_rows(tmp_path / "plain")
    loop = tmp_path / "a.jsonl"
    loop.symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").symlink_to(loop)
    with pytest.raises(UserError, match=r"a\.jsonl: (no such file|cannot be read)"):
        read_rows(loop)


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_keys_that_arrow_adds_to_a_row_are_not_in_it(tmp_path, kind):
    """A column of structs has the keys of all its rows; a template that asks for `tool_calls` finds them in each."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "neg", "arguments": {"x": 2}}}
    said = [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "3"}, BOT]
    given = [{"messages": said, "tools": [{"name": "add", "strict": True}]}, {"messages": [USER, BOT]},
             {"messages": [USER, {"role": "assistant", "tool_calls": [other]}, BOT], "tools": [{"name": "neg"}]},
             {"text": "alone"}]  # fmt: skip
    place = tmp_path / ("a.parquet" if kind == "parquet" else "d")
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([{"text": None} | row for row in given]), place)
    else:
        import datasets

        empty = {"messages": None, "tools": None, "text": None}
        datasets.Dataset.from_list([empty | row for row in given]).save_to_disk(str(place))
    found = [row.values for row in read_rows(place)]
    assert found == given
    assert [type(example_of(row)) for row in read_rows(place)] == [Chat, Chat, Chat, Plain]


def test_a_dataset_of_several_splits_names_them(tmp_path):
    import datasets

    one = datasets.Dataset.from_list([{"text": "x"}])
    datasets.DatasetDict(train=one, test=one).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match=r"holds the splits train, test; name one of them, such as .*d/train"):
        read_rows(tmp_path / "d")
    assert read_rows(tmp_path / "d" / "test")[0].values == {"text": "x"}


def row(**values):
    return Row(where="f.jsonl:7", values=values)


def test_kinds_of_rows():
    tools = [{"type": "function"}]
    assert example_of(row(messages=[USER, BOT], text="ignored")) == Chat(where="f.jsonl:7", messages=(USER, BOT))
    assert example_of(row(messages=[USER, BOT], tools=json.dumps(tools))).tools == tuple(tools)
    assert example_of(row(messages=[USER, BOT], tools=tools)).tools == tuple(tools)
    assert example_of(row(prompt=[USER], completion=[BOT])) == Chat(
        where="f.jsonl:7", messages=(USER, BOT), context=1
    )
    assert example_of(row(prompt="a", completion="b")) == Plain(where="f.jsonl:7", prompt="a", completion="b")
    assert example_of(row(text="c")) == Plain(where="f.jsonl:7", prompt="", completion="c")
    turned = example_of(row(prompt="a", completion="b"), chat=True)
    assert turned.messages == ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    assert turned.context == 1
    columns = ColumnsConfig(prompt="question", completion="answer")
    assert example_of(row(question="a", answer="b"), columns).completion == "b"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"question": "a"}, "a column 'messages', or 'prompt' and 'completion', or 'text'; the row has question"),
        ({"prompt": "a"}, "the row has prompt"),
        ({"text": ""}, "column 'text': expected text, it is empty"),
        ({"prompt": "a", "completion": 5}, "column 'completion': expected text, got int 5"),
        ({"prompt": "a", "completion": [BOT]}, "column 'prompt': expected a list of messages, got str 'a'"),
        ({"messages": []}, "column 'messages': expected a list of messages"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\]: expected a message with a role"),
        ({"messages": [{"role": "user", "content": 4}]}, r"messages\[0\]\.content: expected text, got int 4"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content: expected text, got NoneType None"),
        ({"messages": [USER, BOT], "tools": "{"}, "column 'tools': expected JSON"),
        ({"messages": [USER, BOT], "tools": "{}x"}, "column 'tools': expected JSON"),
        ({"messages": [USER, BOT], "tools": [1]}, "column 'tools': expected a list of tool schemas"),
    ],
)
def test_a_bad_row_is_named_with_its_column(values, said):
    with pytest.raises(UserError, match=r"f\.jsonl:7: .*" + said):
        example_of(row(**values))


def test_prompts_are_the_same_whatever_their_spacing_and_case():
    a = Plain(where="", prompt="What is  2+2?", completion="4")
    b = Chat(where="", messages=({"role": "system", "content": "s"}, {"role": "user", "content": "what is 2+2?"}, BOT))
    c = Chat(where="", messages=({"role": "user", "content": "What IS 2+2? "}, BOT), context=1)
    assert prompt_key(b) == prompt_key(c)
    assert prompt_key(a) == prompt_key(Plain(where="", prompt="what is 2+2?\n", completion="5"))
    assert prompt_key(a) != prompt_key(Plain(where="", prompt="what is 2+3?", completion="4"))


def test_the_held_out_side_follows_from_the_prompt_alone():
    examples = [Plain(where=str(i), prompt=f"problem {i % 500}", completion=str(i)) for i in range(1000)]
    train, held = split_held_out(examples, 0.2)
    assert sorted(train + held) == list(range(1000))
    assert 120 < len(held) < 280
    assert {i % 500 for i in train}.isdisjoint({i % 500 for i in held})
    again, _ = split_held_out(examples[:500], 0.2)
    assert again == [i for i in train if i < 500]


def test_sources_are_read_by_path(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    found = read_examples([SourceConfig(path=str(tmp_path / "a.jsonl"))])
    assert [type(e) for e in found[0]] == [Plain, Plain]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0])), min_size=1, max_size=3),
    st.integers(0, 5),
)
def test_each_row_comes_up_as_often_as_its_weight_says(sources, seed):
    sizes, weights = zip(*sources, strict=True)
    epochs = 4  # a whole number of times for every weight above
    seen = Counter(int(i) for e in range(epochs) for i in epoch_order(sizes, weights, seed, e))
    start = 0
    for size, weight in sources:
        assert {seen[i] for i in range(start, start + size)} == {int(epochs * weight)}
        start += size


def test_orders_are_functions_of_seed_and_epoch():
    one = [epoch_order([50, 20], [1.0, 0.5], 3, e) for e in range(3)]
    assert [len(o) for o in one] == [60, 60, 60]
    np.testing.assert_array_equal(one[2], epoch_order([50, 20], [1.0, 0.5], 3, 2))
    assert not np.array_equal(one[0], one[1])
    assert not np.array_equal(one[0], epoch_order([50, 20], [1.0, 0.5], 4, 0))
    assert set(one[0][one[0] >= 50]).isdisjoint(one[1][one[1] >= 50]), "half of the source, then the other half"
