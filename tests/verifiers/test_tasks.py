"""JSONL into tasks, errors that name file and line, and a split that cannot leak."""

import json
import pathlib

import pytest

from cabochon.errors import UserError
from cabochon.types import Task
from cabochon.verifiers.tasks import Columns, content_hash, normalised, read_rows, read_tasks, spelled, split

GSM8K = {"question": "One and one?", "answer": "1+1=2\n#### 2"}
MATH = {"problem": "Half of one?", "solution": "It is \\boxed{\\frac{1}{2}}.", "level": "Level 1", "type": "Algebra"}
MBPP = {
    "text": "Write add.",
    "code": "def add(a, b): return a+b",
    "task_id": 7,
    "test_setup_code": "",
    "test_list": ["assert add(1, 2) == 3"],
    "challenge_test_list": [],
}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return x\n",
    "test": "def check(f):\n    assert f(1) == 1",
}

LEETCODE = {
    "task_id": "two-sum",
    "prompt": "from typing import *\n\n",
    "query": "Add two numbers.",
    "entry_point": "Solution().add",
    "completion": "class Solution:\n    def add(self, a: int, b: int) -> int:\n        return a + b\n",
    "test": "def check(candidate):\n    assert candidate(a = 1, b = 2) == 3",
}


def write(path: pathlib.Path, *rows: object) -> pathlib.Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_known_shapes(tmp_path: pathlib.Path) -> None:
    rows = (GSM8K, MATH, MBPP, HUMANEVAL, LEETCODE)
    gsm8k, mathematics, mbpp, human, leetcode = read_tasks(write(tmp_path / "mixed.jsonl", *rows))
    assert (gsm8k.id, gsm8k.prompt, gsm8k.verifier) == ("mixed/0", "One and one?", "math")
    assert gsm8k.payload == {"answer": "2"}
    assert gsm8k.domain == "mixed"
    assert (mathematics.payload["answer"], mathematics.domain) == ("\\frac{1}{2}", "Algebra")
    assert (mbpp.id, mbpp.verifier) == ("mbpp/7", "code")
    assert mbpp.payload["test_list"] == ["assert add(1, 2) == 3"]
    assert mbpp.prompt == "Write add.\nYour code should pass this test:\nassert add(1, 2) == 3"
    assert (human.id, human.payload["entry_point"]) == ("HumanEval/0", "f")
    assert human.payload["reference"] == "def f(x):\n    return x\n"
    assert (leetcode.id, leetcode.prompt) == ("two-sum", "Add two numbers.")
    assert leetcode.payload["reference"] == LEETCODE["prompt"] + LEETCODE["completion"]


def test_our_own_rows(tmp_path: pathlib.Path) -> None:
    row = {"id": "a/1", "prompt": [{"role": "user", "content": "Hi"}], "verifier": "thinking", "domain": "d"}
    (task,) = read_tasks(write(tmp_path / "own.jsonl", row, ""))
    assert task == Task(id="a/1", prompt=({"role": "user", "content": "Hi"},), verifier="thinking", domain="d")


def test_what_is_no_task_says_which_column_is_not_there(tmp_path: pathlib.Path) -> None:
    for row, said in (
        ({"question": "1+1?", "verifier": "math"}, r"rows.jsonl:1: no column 'prompt'"),
        ({"ask": "1+1?"}, r"rows.jsonl:1: not a task: expected `prompt`, `verifier`"),
    ):
        with pytest.raises(UserError, match=said):
            read_tasks(write(tmp_path / "rows.jsonl", row))


def test_a_row_without_payload_has_its_other_columns_for_one_as_in_trl(tmp_path: pathlib.Path) -> None:
    row = {"prompt": "A colour?", "colours": ["red"], "level": 2, "completion": "red", "id": "c"}
    with pytest.raises(UserError, match="no column 'verifier'"):
        read_tasks(write(tmp_path / "rows.jsonl", row))
    (task,) = read_tasks(tmp_path / "rows.jsonl", verifier="mine.py:colour")
    assert (task.id, task.verifier, task.payload) == ("c", "mine.py:colour", {"colours": ["red"], "level": 2})
    named = write(tmp_path / "named.jsonl", row | {"verifier": "own.py:f"})
    assert read_tasks(named, verifier="mine.py:colour")[0].verifier == "own.py:f", "a row's own name comes first"
    assert read_tasks(named)[0].payload == {"colours": ["red"], "level": 2}
    whole = write(tmp_path / "whole.jsonl", row | {"verifier": "own.py:f", "payload": {}})
    assert read_tasks(whole)[0].payload == {}, "said to be empty"
    known = write(tmp_path / "mbpp.jsonl", MBPP)
    assert read_tasks(known, verifier="mine.py:f")[0].verifier == "code", "known shapes stay"


def test_columns_as_tables_write_them(tmp_path: pathlib.Path) -> None:
    rows = [
        {"id": None, "domain": None, "prompt": "p", "verifier": "thinking"},
        {"problem": "P", "solution": "so \\boxed{5}", "answer": 4, "unique_id": None},
        {"problem": "P2", "solution": "so \\boxed{5}", "answer": None},
        {**MBPP, "task_id": None, "test_setup_code": None, "test_imports": None},
        {**MBPP, "task_id": 8, "test_imports": "import math"},
        {**MBPP, "task_id": 9, "test_imports": ["import math", "import re"]},
        {**HUMANEVAL, "task_id": None, "canonical_solution": None},
        {"problem": "P3", "solution": "so \\boxed{5}", "answer": float("nan")},
        {**MBPP, "task_id": 10, "code": None},
    ]
    found = read_tasks(write(tmp_path / "t.jsonl", *rows))
    assert [task.id for task in found] == ["t/0", "t/1", "t/2", "t/3", "mbpp/8", "mbpp/9", "t/6", "t/7", "mbpp/10"]
    assert found[0].domain == "t"
    assert [task.payload["answer"] for task in (*found[1:3], found[7])] == ["4", "5", "5"]
    assert (found[6].payload["reference"], found[8].payload["reference"]) == (HUMANEVAL["prompt"], "")
    assert [task.payload["test_setup_code"] for task in found[3:6]] == ["", "import math", "import math\nimport re"]


def test_a_line_without_end_is_not_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cabochon.verifiers.tasks.LINE_LIMIT", 1000)
    with pytest.raises(UserError, match=r"/dev/full:1: the line is longer than 1000 bytes"):
        list(read_rows("/dev/full"))


def test_a_pipe_is_read_and_a_directory_is_not(tmp_path: pathlib.Path) -> None:
    import os
    import threading

    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(json.dumps(GSM8K),))
    writer.start()
    assert [task.id for task in read_tasks(tmp_path / "pipe")] == ["pipe/0"]
    writer.join()
    with pytest.raises(UserError, match="is a directory; expected a file of JSON lines"):
        read_tasks(tmp_path)


def test_a_column_map(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "x.jsonl", {"q": "What?", "a": 5, "k": "id-1", "topic": "t"})
    columns = Columns(prompt="q", verifier="math", payload={"answer": "a"}, id="k", domain="topic")
    assert read_tasks(path, columns) == [
        Task(id="id-1", prompt="What?", verifier="math", payload={"answer": 5}, domain="t")
    ]
    (task,) = read_tasks(write(tmp_path / "y.jsonl", {"q": "What?", "a": 5, "k": None, "topic": None}), columns)
    assert (task.id, task.domain) == ("y/0", "y"), "a null is as none"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{not json", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"a": 1}, "expected `prompt`, `verifier` and what that needs"),
        ({"question": "Q", "answer": "no hashes"}, "#### NUMBER"),
        ({"question": "", "answer": "#### 1"}, "column 'question'"),
        ({"problem": "P", "solution": "no box"}, "no \\boxed answer"),
        ({"text": "t", "test_list": []}, "test_list"),
        ({"prompt": 3, "verifier": "math"}, "list of messages"),
        ({"prompt": "p", "verifier": "m", "payload": 3}, "payload"),
        ("[" * 100_000, "not JSON"),
        ("[", "a line holds one whole object (jq -c '.[]' makes such lines of an array)"),
        ({"prompt": "p", "verifier": "math", "payload": {}}, 'payload["answer"] must be a gold answer, got None'),
        ({"prompt": "p", "verifier": "math", "answer": float("nan")}, "must be a gold answer, got nan"),
        ({"prompt": "p", "verifier": "math", "answer": [" "]}, "must be a gold answer, got ' '"),
        ({"prompt": "p", "verifier": "verdict", "label": "N", "choices": "NY"}, "choices must be a list, got 'NY'"),
        ({"prompt": "p", "verifier": None}, "no column 'verifier'"),
        ({"prompt": "p", "verifier": "verdict", "label": "Yes"}, "payload.label must be one of payload.choices []"),
        ({"prompt": "p", "verifier": "instructions"}, 'payload needs "constraints"'),
        (
            {"prompt": "p", "verifier": "instructions", "constraints": [{"kind": "length:words", "max": 3}]},
            "constraint length:words takes no 'max'; the nearest is 'maximum'",
        ),
        ({"prompt": "p", "verifier": "code"}, "a code task needs payload['tests'], a text or a list of texts"),
        ({"prompt": "p", "verifier": "code", "tests": ["assert f("]}, "the task's tests do not parse"),
        ({"prompt": "p", "verifier": "code", "cases": [{"stdin": "1"}]}, "payload['cases'][0] needs the texts"),
    ],
)
def test_errors_name_file_and_line(tmp_path: pathlib.Path, row: object, says: str) -> None:
    path = write(tmp_path / "bad.jsonl", GSM8K, "", row)
    with pytest.raises(UserError) as raised:
        read_tasks(path)
    assert str(raised.value).startswith(f"{path}:3: ")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_other_errors(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        list(read_rows(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="holds no rows"):
        read_tasks(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "tasks.csv").write_text("prompt,verifier\n1 + 1?,math\n")
    with pytest.raises(UserError, match=r"tasks\.csv: expected JSON lines, one object a line; pandas writes them"):
        read_tasks(tmp_path / "tasks.csv")
    (tmp_path / "tasks.json").write_text('[{"prompt": "1 + 1?", "verifier": "math", "answer": "2"}]')
    with pytest.raises(UserError, match=r"tasks\.json:1: expected a JSON object, got list; each line holds one"):
        read_tasks(tmp_path / "tasks.json")
    twice = write(tmp_path / "twice.jsonl", MBPP, MBPP)
    with pytest.raises(UserError, match=r"twice.jsonl:2: the id 'mbpp/7' was used at .*:1"):
        read_tasks(twice)
    with pytest.raises(UserError, match=r":1: no column 'z'; the row has \['answer', 'question'\]"):
        read_tasks(write(tmp_path / "map.jsonl", GSM8K), Columns(prompt="z", verifier="math"))


def make(prompt: object) -> Task:
    return Task(id="x", prompt=prompt, verifier="math")


def test_the_split_depends_on_the_words_of_the_prompt_alone() -> None:
    copies = [
        "What is 3 + 4?",
        "what is 3+4",
        "  WHAT   is\n3 + 4 ?!",
        "What is ３ + ４?",
        "What is 3\u200b + 4?",
        [{"role": "user", "content": "What is 3 + 4?"}],
        [{"role": "user", "content": [{"type": "text", "text": "What is 3 + 4?"}]}],
        "What is \\left(3 + 4\\right)?",
    ]
    assert len({content_hash(copy) for copy in copies}) == 1
    signs = ["2 * 3 - 1,000 / 4", "2 \\times 3 − 1000 ÷ 4".replace("÷", "/"), "2 × 3 – 1000 / 4", "2·3 - 1,000/4"]
    assert len({content_hash(text) for text in signs}) == 1
    assert content_hash(r"\frac{1}{2}") == content_hash(r"\dfrac{1}{2}") == content_hash(r"\tfrac{1}{2}")
    for different in ("What is 3 - 4?", "What is 34?", "What is 3 + 5?", "What is 3 * 4?"):
        assert normalised(different) != normalised(copies[0])
    for share in (0.05, 0.5, 0.95):
        training, held = split([make(copy) for copy in copies], share)
        assert not training or not held


def test_prompts_are_the_same_by_their_spelling_but_for_space():
    assert spelled("What is\n 3 + 4?") == spelled([{"role": "user", "content": " What is ３ + 4? "}])
    for one, other in (("2*3+4=", "2*(3+4)="), ("capitals in 'abC'?", "capitals in 'ABC'?")):
        assert normalised(one) == normalised(other), "on one side of a split"
        assert spelled(one) != spelled(other), "and not the same"


def test_an_empty_prompt_is_called_that(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r":1: column 'prompt' is empty"):
        read_tasks(write(tmp_path / "t.jsonl", {"prompt": " ", "verifier": "math", "payload": {}}))


def test_the_split_is_the_share_asked_for_and_stays_when_tasks_are_added() -> None:
    tasks = [make(f"How much is {n} and {n * n}?") for n in range(4000)]
    training, held = split(tasks, 0.1)
    assert len(training) + len(held) == 4000
    assert abs(len(held) - 400) < 5 * (4000 * 0.1 * 0.9) ** 0.5  # five standard deviations
    again_training, again_held = split(tasks[::-1][:2000], 0.1)
    assert {task.prompt for task in again_held} <= {task.prompt for task in held}
    assert {task.prompt for task in again_training} <= {task.prompt for task in training}
    wider = split(tasks, 0.2)[1]
    assert {task.prompt for task in held} <= {task.prompt for task in wider}
    assert split(tasks, 0.0)[1] == []
    with pytest.raises(ValueError, match="held_out"):
        split(tasks, 1.0)
