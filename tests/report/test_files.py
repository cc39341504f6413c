import json
import os

from cabochon.report.files import Tail, read_object


def append(path, text):
    with path.open("a") as file:
        file.write(text)


def test_each_line_comes_once_and_half_a_line_waits_for_its_end(tmp_path):
    path = tmp_path / "a.jsonl"
    tail = Tail(path)
    assert list(tail.rows()) == [], "a file that is not there yet"
    append(path, '{"a": 1}\n{"a"')
    assert list(tail.rows()) == [{"a": 1}]
    assert list(tail.rows()) == []
    append(path, ": 2}\n")
    assert not tail.restarted()
    assert list(tail.rows()) == [{"a": 2}]
    assert tail.bad == 0


def test_a_file_cut_back_and_written_on_is_read_anew(tmp_path):
    """What a run does that goes on from a checkpoint; it may have grown past the old end before anybody looks."""
    path = tmp_path / "a.jsonl"
    append(path, '{"a": 1}\n{"a": 2}\n')
    tail = Tail(path)
    assert len(list(tail.rows())) == 2
    os.truncate(path, 9)
    append(path, '{"a": 3}\n{"a": 4}\n')
    assert tail.restarted()
    assert list(tail.rows()) == [{"a": 1}, {"a": 3}, {"a": 4}]
    path.unlink()
    assert tail.restarted()
    assert list(tail.rows()) == []


def test_lines_that_are_no_objects_are_counted_and_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    append(path, '{"a": 1}\nnonsense\n[1]\n\n' + "[" * 100_000 + '\n{"a": 2}\n')
    tail = Tail(path)
    assert [row["a"] for row in tail.rows()] == [1, 2]
    assert tail.bad == 3


def test_lines_longer_than_a_chunk(tmp_path):
    path = tmp_path / "a.jsonl"
    append(path, "".join(json.dumps({"n": n, "x": "y" * 700_000}) + "\n" for n in range(4)))
    assert [row["n"] for row in Tail(path).rows()] == [0, 1, 2, 3]


def test_an_object_that_is_half_written_is_none(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    assert read_object(tmp_path / "a.json") is None
    assert read_object(tmp_path / "b.json") is None
