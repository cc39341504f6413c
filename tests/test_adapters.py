"""Rows of verl, SkyRL and verifiers become tasks that our readers take, judged by the functions that came with them."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from cabochon.adapters import import_tasks
from cabochon.errors import UserError
from cabochon.verifiers.build import verifier_for
from cabochon.verifiers.tasks import read_tasks

ASK = [{"role": "user", "content": "What is 70 + 2?"}]
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": ASK,
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {"index": 5, "split": "train"},
}
SKYRL = {k: VERL[k] for k in ("data_source", "prompt", "extra_info")} | {
    "env_class": "gsm8k",
    "reward_spec": {"method": "rule", "ground_truth": "72"},
}
VERIFIERS = {"question": "What is 70 + 2?", "answer": "72", "info": json.dumps({"unit": "apples"}), "task": "sums"}
ROWS = {"verl": VERL, "skyrl": SKYRL, "verifiers": VERIFIERS}

REWARDS = '''
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    right = solution_str.split()[-1] == ground_truth
    return {"score": float(right), "source": data_source, "index": extra_info["index"]}


async def correct(completion, answer, info, state, **kwargs):
    assert state["answer"] == answer and kwargs["prompt"][0]["role"] == "user"
    text = completion[-1]["content"]
    return 0.5 * (answer in text) + 0.5 * (info["unit"] in text)
'''


@pytest.fixture
def rewards(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return path


def written(path, rows, suffix):
    file = path / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("form", ROWS)
def test_without_a_reward_the_maths_verifier_judges(tmp_path, form):
    source, out = written(tmp_path, [ROWS[form]] * 2, ".parquet"), tmp_path / "new/tasks.jsonl"
    assert import_tasks(form, source, out) == 2
    tasks = read_tasks(out)
    assert [t.id for t in tasks] == ["rows/0", "rows/1"]
    assert tasks[0].domain == ("sums" if form == "verifiers" else "openai/gsm8k")
    verifier = verifier_for(tasks)
    assert verifier.verify(tasks[0], r"The answer is \boxed{72}.").score == 1.0
    assert verifier.verify(tasks[0], r"The answer is \boxed{71}.").score == 0.0
    assert [m["content"] for m in tasks[0].prompt] == [ASK[0]["content"]] if form != "verifiers" else tasks[0].prompt


@pytest.mark.parametrize("form", ["verl", "skyrl"])
def test_compute_score_judges_with_all_it_was_given(tmp_path, rewards, form):
    out = tmp_path / "tasks.jsonl"
    import_tasks(form, written(tmp_path, [ROWS[form]], ".parquet"), out, reward=f"{rewards}:compute_score")
    tasks = read_tasks(out)
    verdict = verifier_for(tasks).verify(tasks[0], "It is 72")
    assert (verdict.score, verdict.evidence["source"], verdict.evidence["index"]) == (1.0, "openai/gsm8k", 5)
    assert verifier_for(tasks).verify(tasks[0], "It is 71").score == 0.0


def test_a_rubrics_function_judges_with_the_names_it_takes(tmp_path, rewards):
    out = tmp_path / "tasks.jsonl"
    import_tasks("verifiers", written(tmp_path, [VERIFIERS], ".jsonl"), out, reward=f"{rewards}:correct")
    tasks = read_tasks(out)
    judge = verifier_for(tasks)
    assert [judge.verify(tasks[0], text).score for text in ("72 apples", "72 pears", "none")] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("form", "change", "said"),
    [
        ("verl", {"reward_model": None}, "rows.jsonl:2: column 'reward_model': expected an object with ground_truth"),
        ("verl", {"reward_model": {"style": "rule"}}, "rows.jsonl:2: column 'reward_model.ground_truth' is missing"),
        ("verl", {"reward_model": {"ground_truth": [1]}}, "'reward_model.ground_truth': expected an answer .*--reward"),
        ("verl", {"prompt": []}, "rows.jsonl:2: column 'prompt': expected text or a list of messages, it is empty"),
        ("verl", {"prompt": [{"role": "user"}]}, "rows.jsonl:2: column 'prompt', message 0: expected a message"),
        ("verl", {"data_source": 7}, "rows.jsonl:2: column 'data_source': expected text, got int 7"),
        ("skyrl", {"reward_spec": "72"}, "rows.jsonl:2: column 'reward_spec': expected an object"),
        ("verifiers", {"answer": None}, "rows.jsonl:2: column 'answer' is missing or null"),
        ("verifiers", {"info": "{"}, "rows.jsonl:2: column 'info': expected an object or JSON"),
        ("verifiers", {"question": 3}, "rows.jsonl:2: column 'question': expected text"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_and_nothing_is_written(tmp_path, form, change, said):
    out = tmp_path / "tasks.jsonl"
    with pytest.raises(UserError, match=said):
        import_tasks(form, written(tmp_path, [ROWS[form], ROWS[form] | change], ".jsonl"), out)
    assert {p.name for p in tmp_path.iterdir()} == {"rows.jsonl"}


def test_what_is_there_is_not_replaced_unasked(tmp_path, rewards):
    out, source = tmp_path / "tasks.jsonl", written(tmp_path, [VERL], ".jsonl")
    out.write_text("mine")
    with pytest.raises(UserError, match="exists already; add --overwrite"):
        import_tasks("verl", source, out)
    assert out.read_text() == "mine"
    assert import_tasks("verl", source, out, overwrite=True) == 1
    with pytest.raises(UserError, match="no such file"):
        import_tasks("verl", source, tmp_path / "b.jsonl", reward="nothing.py:f")
