"""`cabochon verify` and `cabochon reward test` as a user runs them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from cabochon.errors import MachineError, UserError
from cabochon.verifiers.cli import reward_test_command, verify_command
from cabochon.verifiers.sandbox.cli import attack_command

APP = typer.Typer()
APP.command("verify")(verify_command)
APP.command("reward-test")(reward_test_command)
APP.command("attack")(attack_command)
RUN = CliRunner()

ROWS = [
    {"question": "1+1?", "answer": "so\n#### 2", "completion": "\\boxed{2}"},
    {"question": "1+2?", "answer": "so\n#### 3", "completion": "\\boxed{2}"},
    {"question": "1+3?", "answer": "so\n#### 4", "completion": ""},
    {
        "prompt": "Speak.",
        "verifier": "instructions",
        "payload": {"constraints": [{"kind": "length:words", "maximum": 1}]},
        "completion": "Hello",
    },
]


def write(path: pathlib.Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_verify_writes_rows_and_a_table(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out.jsonl"
    done = RUN.invoke(APP, ["verify", write(tmp_path / "rows.jsonl", ROWS), "--out", str(out)])
    assert done.exit_code == 0, done.output
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["score"] for row in verdicts] == [1.0, 0.0, 0.0, 1.0]
    assert [row["status"] for row in verdicts] == ["ok", "wrong", "no_answer", "ok"]
    assert verdicts[1]["evidence"] == {"gold": "3", "answer": "2", "method": "boxed", "value": "2"}
    lines = done.output.splitlines()
    assert lines[1].split()[:4] == ["instructions", "1", "1", "1.0000"]
    assert lines[2].split()[:4] == ["math", "3", "3", "0.3333"]
    assert lines[2].endswith("no_answer 1, ok 1, wrong 1")


def test_verify_with_a_reward_function(tmp_path: pathlib.Path) -> None:
    reward = tmp_path / "mine.py"
    reward.write_text("def score(completions, **kwargs): return [float(len(c)) / 10 for c in completions]\n")
    rows = write(tmp_path / "rows.jsonl", [{**ROWS[0], "text": "abcde"}])
    out = tmp_path / "out.jsonl"
    done = RUN.invoke(APP, ["verify", rows, "--column", "text", "--reward", f"{reward}:score", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["score"] == 0.5


def test_verify_tells_what_is_wrong_with_a_row(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "rows.jsonl", [ROWS[0], {"question": "Q", "answer": "#### 1"}])
    done = RUN.invoke(APP, ["verify", path])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith(f"{path}:2: no column 'completion' with the completion; the row has")
    unknown = write(tmp_path / "unknown.jsonl", [ROWS[0], {"prompt": "p", "verifier": "maths", "completion": "x"}])
    done = RUN.invoke(APP, ["verify", unknown])
    assert str(done.exception).startswith(f"{unknown}:2: no verifier is called 'maths'")
    assert "nearest is 'math'" in str(done.exception)
    null = write(tmp_path / "null.jsonl", [{**ROWS[0], "completion": None}])
    done = RUN.invoke(APP, ["verify", null])
    assert str(done.exception).endswith("must be a text or a list with one assistant's message, got null")
    no_gold = write(tmp_path / "gold.jsonl", [{"prompt": "p", "verifier": "math", "completion": "x"}])
    done = RUN.invoke(APP, ["verify", no_gold])
    assert str(done.exception) == f'{no_gold}:1: payload["answer"] must be a gold answer, got None'


def test_what_verify_is_told_is_checked_before_it_reads(tmp_path: pathlib.Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    for told, says in (
        (["--reward", " "], "--reward is empty; expected a verifier's name or module:function"),
        (["--out", "x" * 300], "File name too long"),
    ):
        done = RUN.invoke(APP, ["verify", rows, *told])
        assert isinstance(done.exception, UserError)
        assert says in str(done.exception)
    done = RUN.invoke(APP, ["verify", "x" * 300])
    assert isinstance(done.exception, UserError)


def test_verdicts_can_go_to_a_device(tmp_path: pathlib.Path) -> None:
    done = RUN.invoke(APP, ["verify", write(tmp_path / "rows.jsonl", ROWS[:1]), "--out", "/dev/null"])
    assert done.exit_code == 0, done.output
    assert not pathlib.Path("/dev/null").is_file()


def test_verify_reads_a_completion_that_is_a_message(tmp_path: pathlib.Path) -> None:
    said = [{"role": "assistant", "content": "\\boxed{2}"}]
    done = RUN.invoke(APP, ["verify", write(tmp_path / "rows.jsonl", [{**ROWS[0], "completion": said}])])
    assert done.output.splitlines()[1].split()[:4] == ["math", "1", "1", "1.0000"]


def test_where_the_verdicts_cannot_go_is_said_before_anything_is_judged(tmp_path: pathlib.Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    before = pathlib.Path(rows).read_text()
    (tmp_path / "link.jsonl").symlink_to(rows)
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for out, says in (
        (str(tmp_path), "is a directory; expected the name of a file, such as"),
        (rows, "is the file that is read; choose another name"),
        (str(tmp_path / "link.jsonl"), "is the file that is read; choose another name"),
        (str(tmp_path / "loop.jsonl"), "loop"),
        (f"{rows}/x/out.jsonl", "rows.jsonl is not a directory that may be written to"),
    ):
        done = RUN.invoke(APP, ["verify", rows, "--out", out])
        assert isinstance(done.exception, UserError)
        assert says in str(done.exception)
        assert "verifier" not in done.output
    assert pathlib.Path(rows).read_text() == before


def test_a_full_disk_leaves_the_table_and_the_file_as_it_was(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out.jsonl"
    out.write_text("an earlier run\n")
    rows = write(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr("cabochon.files.os.fsync", full)
    done = RUN.invoke(APP, ["verify", rows, "--out", str(out)])
    assert isinstance(done.exception, MachineError)
    assert str(done.exception) == f"{out}: cannot be written: No space left on device"
    assert "no_answer 1, ok 1, wrong 1" in done.output
    assert out.read_text() == "an earlier run\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_verdict_rows_are_json_whatever_a_reward_says(tmp_path: pathlib.Path) -> None:
    reward = tmp_path / "own.py"
    reward.write_text(
        "def score(completions, log_metric, **kwargs):\n    log_metric('loss', float('inf'))\n    return [1.0]\n"
    )
    out = tmp_path / "made" / "out.jsonl"
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "x"}])
    done = RUN.invoke(APP, ["verify", rows, "--reward", f"{reward}:score", "--out", str(out)])
    assert done.exit_code == 0, done.output

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    assert json.loads(out.read_text(), parse_constant=refuse)["evidence"] == {"loss": "inf", "reward": 1.0}


@pytest.mark.parametrize("name", ["math", "instructions", "thinking"])
def test_the_built_in_rewards_look_sound(name: str) -> None:
    done = RUN.invoke(APP, ["reward-test", name])
    assert done.exit_code == 0, done.output
    assert "0 suspicious: the reward looks sound" in done.output


BAD = """
import random, time
def substring(completions, solution, **kwargs):
    return [float(s.strip("$") in c) for c, s in zip(completions, solution)]
def chance(completions, **kwargs): return [random.random()]
def always(completions, **kwargs): return [1.0]
def crashes(completions, **kwargs): return [1.0 / len(completions[0])]
def broken(completions, **kwargs): return [1.0 / 0]
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("substring", "gold while thinking only scores 1"),
        ("chance", "not deterministic"),
        ("always", "blank scores 1"),
        ("crashes", "infra_error: ZeroDivisionError"),
    ],
)
def test_bad_rewards_are_found_out(tmp_path: pathlib.Path, name: str, says: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(BAD)
    done = RUN.invoke(APP, ["reward-test", f"{path}:{name}"])
    assert done.exit_code == 1
    assert says in done.output
    assert "left out" not in done.output


def test_a_reward_that_always_fails_is_not_asked_everything(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(BAD)
    done = RUN.invoke(APP, ["reward-test", f"{path}:broken"])
    assert done.exit_code == 1
    assert done.output.count("ZeroDivisionError: float division by zero (bad.py:8)") == 4
    assert "the other probes were left out: the first 4 failed alike\n\n4 probes, 4 suspicious" in done.output


OWN = """
def exact(completions, answer, **kwargs): return [float(c.strip() == a) for c, a in zip(completions, answer)]
def boxed(completions, answer, **kwargs): return [float(c.endswith(f"{{{a}}}.")) for c, a in zip(completions, answer)]
def zero(completions, **kwargs): return [0.0 for _ in completions]
def percent(completions, answer, **kwargs): return [100.0 * (c.strip() == a) for c, a in zip(completions, answer)]
def partly(completions, answer, **kwargs): return [1.0 if c.strip() == a else 0.2 * bool(c.strip()) for c, a in
    zip(completions, answer)]
def largely(completions, answer, **kwargs): return [1.0 if c.strip() == a else 0.7 * bool(c.strip()) for c, a in
    zip(completions, answer)]
def effort(completions, answer, **kwargs): return [1.0 if c.strip() == a else 0.1 for c, a in zip(completions, answer)]
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("exact", "0 suspicious: the reward looks sound"),
        ("boxed", "0 suspicious: the reward looks sound"),
        ("zero", "the right answer scores 0.0: reward 0; it was '2 3'"),
        ("percent", "returned 100, outside [0, 1]"),
        ("partly", "0 suspicious: the reward looks sound"),
        ("largely", "wrong scores 0.7"),
        ("effort", "blank scores 0.1"),
    ],
)
def test_a_reward_function_is_asked_for_the_answer_of_the_row_plain_or_boxed(
    tmp_path: pathlib.Path, name: str, says: str
) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    tasks = write(tmp_path / "tasks.jsonl", [{"prompt": "Sort 3 2.", "answer": "2 3"}])
    done = RUN.invoke(APP, ["reward-test", f"{path}:{name}", "--tasks", tasks])
    assert says in done.output
    assert done.exit_code == ("sound" not in says)


def test_a_reward_that_was_asked_for_no_right_answer_is_not_called_sound(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    tasks = write(tmp_path / "tasks.jsonl", [{"prompt": "Sort 3 2.", "numbers": "3 2"}])
    done = RUN.invoke(APP, ["reward-test", f"{path}:zero", "--tasks", tasks])
    assert "0 suspicious: no right answer was tried, give the rows a `gold`" in done.output


def test_verify_says_why_verdicts_are_missing(tmp_path: pathlib.Path) -> None:
    reward = tmp_path / "own.py"
    reward.write_text("def raises(completions, **kwargs): return [1 / 0]\n")
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "x"}] * 2)
    done = RUN.invoke(APP, ["verify", path, "--reward", f"{reward}:raises"])
    assert done.exit_code == 1
    assert "infra_error 2\n  2 x ZeroDivisionError" in done.output


def test_probing_with_ones_own_tasks(tmp_path: pathlib.Path) -> None:
    path = write(
        tmp_path / "tasks.jsonl", [{"question": "1+1?", "answer": "#### 2"}, {"question": "1+2?", "answer": "#### 3"}]
    )
    done = RUN.invoke(APP, ["reward-test", "math", "--tasks", path, "--limit", "2"])
    assert done.exit_code == 0, done.output
    assert "another task's gold" in done.output


SAYS = "def score(completions, **kwargs): raise ValueError(f'no number in\\n{completions[0]}')\n"


def test_what_a_terminal_cannot_show_costs_no_verdict(tmp_path: pathlib.Path) -> None:
    reward = tmp_path / "odd.py"
    reward.write_text(SAYS)
    rows, out = write(tmp_path / "rows.jsonl", [{**ROWS[0], "completion": "\ud83d é"}]), tmp_path / "out.jsonl"
    words = [sys.executable, "-m", "cabochon", "verify", rows, "--reward", f"{reward}:score", "--out", str(out)]
    done = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=120)
    assert (done.returncode, done.stderr) == (1, b""), done
    assert b"no number in \\ud83d \\xe9" in done.stdout
    assert json.loads(out.read_text())["status"] == "infra_error"


@pytest.mark.parametrize("where", ["full", "closed"])
def test_a_terminal_that_takes_nothing_costs_no_verdict(tmp_path: pathlib.Path, where: str) -> None:
    rows, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out.jsonl"
    words = [sys.executable, "-m", "cabochon", "verify", rows, "--out", str(out)]
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "wb") if where == "full" else open(writing, "wb") as stdout:
        done = subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, timeout=120)
    said = b"cabochon: standard output: cannot be written: No space left on device\n" if where == "full" else b""
    assert (done.returncode, done.stderr) == (1, said)
    assert len(out.read_text().splitlines()) == len(ROWS)


def test_a_file_that_breaks_while_it_is_read_is_named() -> None:
    done = RUN.invoke(APP, ["verify", "/proc/self/mem"])
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == "/proc/self/mem: cannot be read: Input/output error"


def test_what_is_dockers_is_refused_elsewhere() -> None:
    for option in ("--image", "--runtime"):
        done = RUN.invoke(APP, ["attack", option, "x"])
        assert isinstance(done.exception, UserError)
        assert f"{option} is of --sandbox docker, got --sandbox bubblewrap" in str(done.exception)
