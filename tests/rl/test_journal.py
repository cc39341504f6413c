import json
from dataclasses import replace

import numpy as np
from typer.testing import CliRunner

from cabochon.cli import app
from cabochon.rl import journal
from cabochon.types import Completion, Rollout, Score, Task, Verdict


def rollout(text, group=0, score=1.0, domain="d"):
    tokens = np.arange(1, len(text) + 1, dtype=np.int32)
    n = len(tokens)
    completion = Completion(
        tokens=tokens, logprobs=np.full(n, -0.5, np.float32), mask=np.ones(n, bool), text=text, finish="stop",
        policy_version=np.full(n, 3, np.int32), routes=np.tile(np.array([[[0, 2]], [[1, 2]]]), (n, 1, 1))[:n],
    )  # fmt: skip
    verdict = Verdict(score=score, status="ok" if score == 1 else "wrong", evidence={"answer": {1, 2}})
    task = Task(id=f"t{group}", prompt="what?", verifier="math", domain=domain)
    return Rollout(task=task, completion=completion, group=group, verdict=verdict)


def row(r, reward=1.0):
    return journal.rollout_row(
        r, reward, {"verifier": reward, "judge": float("nan")}, np.full(len(r.completion.tokens), 0.25)
    )


def test_a_row_is_plain_json_and_holds_what_was_decided(tmp_path):
    r = rollout("ab\x00\ud800")
    task = replace(r.task, payload={"note": "cut \ud83d"}, domain="\udc00")
    r = replace(r, task=task, verdict=replace(r.verdict, detail="ValueError: \ud800 boo"))
    journal.write_rollouts(tmp_path / "rollouts", 7, [row(r)])
    (found,) = [json.loads(x) for x in (tmp_path / "rollouts" / "step_000007.jsonl").read_text().splitlines()]
    assert found["text"] == "ab\x00?", "UTF-8 has no bytes for half of a surrogate pair"
    assert (found["payload"], found["domain"]) == ({"note": "cut ?"}, "?")
    assert found["verdict"]["detail"] == "ValueError: ? boo"
    assert found["advantage"] == 0.25
    assert found["versions"] == [3, 3]
    assert found["components"] == {"verifier": 1.0, "judge": None}, "what is not known is null, never 0"
    assert found["evidence"]["answer"] == "{1, 2}"
    assert list((tmp_path / "rollouts").iterdir()) == [tmp_path / "rollouts" / "step_000007.jsonl"]


def test_experts_are_counted_by_layer_and_what_was_not_recorded_is_not():
    routes = np.array([[[0, 1], [3, 2]], [[0, 2], [3, 1]], [[-1, -1], [-1, -1]]])
    assert journal.expert_counts(routes) == [[2, 1, 1, 0], [0, 1, 1, 2]]


def test_the_table_shows_good_and_bad_and_cannot_be_commanded():
    rows = [
        row(rollout("fine", 0), 1.0),
        row(rollout("\x1b[2Jbad\n\u202etxet", 1, 0.0), 0.0),
        row(rollout("so", 2), 0.5),
    ]
    text = journal.table(rows, most=3)
    assert "\x1b" not in text
    assert "\u202e" not in text
    lines = text.splitlines()
    assert len(lines) == 4
    assert " 1.00  ok" in lines[1]
    assert " 0.00  wrong" in lines[2]
    assert "�[2Jbad⏎" in lines[2]


def test_a_line_is_judged_again_by_the_verify_command(tmp_path):
    r = rollout("4")
    r = replace(r, task=Task(id="sum", prompt="2 + 2?", verifier="math", payload={"answer": "4"}))
    journal.write_rollouts(tmp_path, 1, [row(r)])
    lines, out = tmp_path / "step_000001.jsonl", tmp_path / "verdicts.jsonl"
    done = CliRunner().invoke(app, ["verify", str(lines), "--column", "text", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["score"] == 1.0


def test_advantages_are_written_token_by_token_only_where_they_differ():
    r = rollout("ab")
    assert "advantages" not in journal.rollout_row(r, 1.0, {}, np.array([0.5, 0.5]))
    assert journal.rollout_row(r, 1.0, {}, np.array([0.5, -0.25]))["advantages"] == [0.5, -0.25]


def test_what_a_judge_wrote_is_kept_beside_the_verifiers_evidence():
    said = {"judge": Score(value=0.5, model_id="m", evidence={"critique": "good, but"}), "other": None}
    found = journal.rollout_row(rollout("a"), 1.0, {}, np.array([0.5]), said)
    assert found["scores"]["judge"]["evidence"] == {"critique": "good, but"}
    assert set(found["scores"]) == {"judge"}, "who was not asked said nothing"
