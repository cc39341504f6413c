import json
import subprocess
import sys

import pytest
import runs

from cabochon.report import rollouts
from cabochon.tokenizer import ByteTokenizer, Tokenizer


def test_pieces_join_to_the_text_and_a_character_of_several_tokens_is_in_its_last():
    tokenizer = ByteTokenizer()
    text = "né 🙂!"
    ids = [*text.encode(), 260]
    found = rollouts.pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert found[:3] == ["n", "", "é"]
    assert found[4:8] == ["", "", "", "🙂"]
    broken = rollouts.pieces(tokenizer, [0xFF, 97, 0xE2])
    assert len(broken) == 3
    assert "".join(broken) == tokenizer.decode([0xFF, 97, 0xE2])


def test_any_beginning_of_the_spread_covers_the_run():
    assert rollouts.spread([], 5) == []
    assert rollouts.spread([7], 5) == [7]
    assert rollouts.spread(list(range(1, 101)), 3)[:2] == [100, 1]
    assert sorted(rollouts.spread(list(range(9)), 99)) == list(range(9))


def test_groups_are_those_that_differ_most_in_each_domain(tmp_path):
    def row(group, domain, reward):
        return {"group": group, "domain": domain, "reward": reward, "prompt": "p", "text": "t"}

    rows = [row(g, d, r) for g, (d, rewards) in enumerate([("a", (1, 1)), ("a", (0, 1)), ("b", (0, 0)), ("a", (1, 1))])
            for r in rewards]  # fmt: skip
    path = tmp_path / "step_000001.jsonl"
    runs.lines(path, rows)
    with path.open("a") as file:
        file.write('{"group": 9, "rew')
    found = rollouts.groups_of(path, None, groups=2, completions=8)
    assert found["of"] == 3 + 1
    assert [(g["domain"], g["reward"]) for g in found["groups"]] == [("a", 0.5), ("b", 0.0)]


def test_long_things_are_cut_and_said_to_be(tmp_path):
    text = "x" * 2000
    row = runs.completion(0, 0, text, 1.0) | {"evidence": {"list": list(range(99)), "deep": {"a": "y" * 9000}}}
    runs.lines(tmp_path / "s.jsonl", [row])
    found = rollouts.groups_of(tmp_path / "s.jsonl", ByteTokenizer(), groups=1, completions=1)
    (c,) = found["groups"][0]["completions"]
    assert c["skipped"] == [400, 2001 - 600]
    assert len(c["pieces"]) == len(c["logprobs"]) == len(c["mask"]) == 600
    assert c["evidence"]["list"][-1] == "… 69 more"
    assert c["evidence"]["deep"]["a"].endswith("… (6,000 characters more)")


@pytest.mark.parametrize(
    ("odd", "counted"),
    [
        ({"logprobs": [None] * 9}, True), ({"logprobs": [-1.0]}, True), ({"mask": 5}, True), ({"tokens": 7}, True),
        ({"tokens": [2**40, 1], "logprobs": [0, 0], "mask": [1, 1]}, True), ({"entropy": ["x"] * 9}, True),
        ({"clipped": [float("nan")] * 9}, True), ({"reward": float("nan")}, False), ({"reward": 1e308}, False),
        ({"group": [1, 2]}, False), ({"prompt": 5}, False), ({"prompt": {"a": 1}}, False),
        ({"verdict": {"status": 5, "detail": {"a": 1}}, "versions": 3, "components": [1], "scores": [3]}, False),
    ],
)  # fmt: skip
def test_a_completion_that_cannot_be_read_as_such_is_shown_as_text_and_counted(tmp_path, odd, counted):
    runs.lines(tmp_path / "s.jsonl", [runs.completion(0, 0, "4", 1.0), runs.completion(0, 1, "word", 1.0) | odd])
    found = rollouts.groups_of(tmp_path / "s.jsonl", ByteTokenizer(), groups=4, completions=4)
    shown = {c["line"]: c for g in found["groups"] for c in g["completions"]}
    assert len(shown) == 2
    assert shown[1]["pieces"]
    assert found["odd"] == counted
    assert shown[2].get("text") == ("word" if counted else None)


def test_the_command_of_a_completion_judges_it_again(tmp_path):
    """As it is copied from the page, in a shell, with a path that wants quoting."""
    place = runs.rl_run(tmp_path / "a run's", 3, texts=("4", "5"), rollouts=2)
    found = rollouts.groups_of(rollouts.steps_of(place)[3], None, groups=1, completions=2)["groups"][0]
    command = found["completions"][1]["again"].replace("cabochon", f"{sys.executable} -m cabochon")
    subprocess.run(["sh", "-c", f"{command} --out out.jsonl"], cwd=tmp_path, check=True, timeout=120)
    judged = json.loads((tmp_path / "out.jsonl").read_text())
    assert (judged["id"], judged["status"]) == ("completion/0", "wrong"), "5 is not 4"


def test_the_tokenizer_is_the_runs_own_or_its_models(tmp_path):
    place = runs.rl_run(tmp_path / "run", 2)
    assert isinstance(rollouts.tokenizer_of(place, None), Tokenizer)
    (place / "tokenizer" / "tokenizer.json").unlink()
    assert rollouts.tokenizer_of(place, None) is None
    ByteTokenizer().save(tmp_path / "model")
    assert rollouts.tokenizer_of(place, str(tmp_path / "model")) is not None
