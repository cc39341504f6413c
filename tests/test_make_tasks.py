"""Tasks with answers as rows: what SFT reads is what the judge says is right, and no problem is on both sides."""

import json

import pytest

from cabochon.errors import UserError
from cabochon.make_tasks import PuzzlesConfig, TasksConfig, make
from cabochon.overrides import load
from cabochon.verifiers.build import verifier_for
from cabochon.verifiers.tasks import content_hash, read_tasks

SUMS = {"name": "chain_sum", "size": 60, "seed": 1, "config": {"max_terms": 2, "max_digits": 1}}
WORDS = {"name": "spell_backward", "size": 40}


def config(place, **changes):
    base = {"out": str(place), "puzzles": [SUMS, WORDS], "programs": [{"size": 20}], "held_out": 0.3}
    return TasksConfig.model_validate(base | changes)


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("changes", [{}, {"prompt": "{question}\n", "completion": "{answer}"}])
def test_every_completion_is_judged_right_and_sides_do_not_overlap(tmp_path, changes):
    made = make(config(tmp_path / "out", **changes))
    train, test = rows(tmp_path / "out" / "train.jsonl"), rows(tmp_path / "out" / "test.jsonl")
    assert made == (len(train), len(test))
    assert {row["domain"] for row in train} == {"chain_sum", "spell_backward", "code"}
    held = {content_hash(row["prompt"]) for row in test}
    assert held.isdisjoint({content_hash(row["prompt"]) for row in train})
    assert len({row["prompt"] for row in test}) == len(test)
    tasks = read_tasks(tmp_path / "out" / "test.jsonl")
    assert [task.prompt for task in tasks] == [row["prompt"] for row in test]
    if changes:
        assert all(row["prompt"].endswith("\n") and "<answer>" not in row["prompt"] for row in test)
    judge = verifier_for(tasks)
    domains = [row["domain"] for row in test]
    picked = [domains.index(d) for d in ("chain_sum", "spell_backward", "code")]
    for i in picked if changes else picked[:2]:  # a program stands by itself or in a block, not in <answer>
        assert judge.verify(tasks[i], test[i]["completion"]).score == 1
        assert judge.verify(tasks[i], "nothing of the kind").score == 0


def test_a_share_of_the_demonstrations_gives_up_and_no_task_does(tmp_path):
    make(config(tmp_path / "whole"))
    made = make(config(tmp_path / "out", gives_up=0.4, excuse="No idea."))
    train, whole = rows(tmp_path / "out" / "train.jsonl"), rows(tmp_path / "whole" / "train.jsonl")
    excuses = [row["completion"] == "No idea." for row in train]
    assert 0.25 < sum(excuses) / made[0] < 0.55
    for row, same, excuse in zip(train, whole, excuses, strict=True):
        assert row == (same | {"completion": "No idea."} if excuse else same)
    assert rows(tmp_path / "out" / "test.jsonl") == rows(tmp_path / "whole" / "test.jsonl")


def test_what_cannot_be_made_is_said_and_nothing_is_written(tmp_path):
    place = tmp_path / "out"
    with pytest.raises(UserError, match="has no dataset 'chain_sums'; the nearest is 'chain_sum'"):
        make(config(place, puzzles=[{"name": "chain_sums", "size": 3}]))
    with pytest.raises(UserError, match="made twice with the same settings and seed"):
        make(config(place, puzzles=[WORDS | {"size": 8}, WORDS | {"size": 9}], programs=[]))
    enormous = {"min_numbers": 10**9, "max_numbers": 10**9}
    with pytest.raises(UserError, match=r"3 items of gcd cannot be made with .*1000000000"):
        make(config(place, puzzles=[{"name": "gcd", "size": 3, "config": enormous}], programs=[]))
    with pytest.raises(UserError, match=r"leave 1 to train on and 0 held out|leave 0 to train on and 1 held out"):
        make(config(place, puzzles=[WORDS | {"size": 1}], programs=[]))
    assert not place.exists()
    make(config(place))
    with pytest.raises(UserError, match="exists and is not empty"):
        make(config(place))
    before = (place / "test.jsonl").read_bytes()
    make(config(place), overwrite=True)
    assert (place / "test.jsonl").read_bytes() == before


def test_one_dataset_at_several_difficulties_is_one_file_of_tasks(tmp_path):
    levels = [{"name": "gcd", "size": 20, "config": {"min_numbers": n, "max_numbers": n}} for n in (2, 3)]
    made = make(config(tmp_path / "out", puzzles=levels, programs=[]))
    train, held = (read_tasks(tmp_path / "out" / name) for name in ("train.jsonl", "test.jsonl"))
    assert (len(train), len(held)) == made
    assert len({task.id for task in train + held}) == sum(made) == 40


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("completion=answer", r"expected a text with {answer} in it"),
        ("prompt='Q: {question}'", r"expected a text that begins with {question}"),
        ("puzzles=[]", "no tasks: give puzzles or programs"),
    ],
)
def test_mistakes_in_the_recipe(setting, said):
    with pytest.raises(UserError, match=said):
        load(TasksConfig, [], ["out=x", "puzzles=[{name: chain_sum, size: 5}]", setting])


def test_the_schema_is_what_the_datasets_take():
    assert PuzzlesConfig.model_validate(SUMS).config == {"max_terms": 2, "max_digits": 1}
