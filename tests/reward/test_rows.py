"""Training rows: hard negatives of matched length, and the very prompt the judge will be asked with."""

import pytest

from cabochon.data import Chat, Row, example_of
from cabochon.errors import UserError
from cabochon.reward.evaluate import INJECTIONS, PADDING
from cabochon.reward.judge import PAIRWISE, Judge, JudgeConfig, PairwiseJudge
from cabochon.reward.rows import (
    PLEAS,
    Labelled,
    attacked,
    labelled_of,
    matched,
    preference_rows,
    sft_rows,
    task_rows,
)
from cabochon.types import Task
from cabochon.verifiers.build import verifier_named


class Unasked:
    model_id, specials = "none", ("<|im_end|>",)

    def ask(self, *_, **__):
        raise AssertionError


JUDGE = Judge(Unasked(), JudgeConfig(reason=False))


def item(response, right, prompt="1+1?", rationale=""):
    return Labelled(where="f:1", prompt=prompt, response=response, right=right, rationale=rationale)


def read(**values):
    return labelled_of(Row(where="f.jsonl:2", values=values))


def test_rows_are_labelled_completions_or_preference_pairs():
    (one,) = read(prompt="q", completion="a", label=False, rationale="no", payload={"answer": "b"})
    assert (one.right, one.rationale, one.task.payload) == (False, "no", {"answer": "b"})
    good, bad = read(prompt="q", chosen="a", rejected=[{"role": "assistant", "content": "b"}])
    assert [(x.response, x.right) for x in (good, bad)] == [("a", True), ("b", False)]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"chosen": "a", "rejected": "b"}, "column 'prompt'"),
        ({"prompt": "q", "completion": "a"}, "expected columns prompt, completion and label"),
        ({"prompt": "q", "completion": "a", "label": 0.5}, "'label': expected true or false, got 0.5"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are equal"),
        ({"prompt": "q", "completion": 3, "label": True}, "'completion': expected text"),
        ({"prompt": [1], "completion": "a", "label": True}, "'prompt': expected messages with a role and a content"),
        ({"prompt": [{"content": "q"}], "completion": "a", "label": True}, "'prompt': expected messages with a role"),
        ({"prompt": "q", "completion": "a", "label": True, "payload": [1]}, "'payload': expected an object"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "payload": "x"}, "'payload': expected an object"),
    ],
)
def test_bad_rows(values, said):
    with pytest.raises(UserError, match=r"f\.jsonl:2: ") as caught:
        read(**values)
    assert said in str(caught.value)


def test_negatives_are_hard_matched_and_used_once():
    items = [item("42 ok", True), item("43 ok", False), item("44 ok", False), item("x" * 50, False)]
    items += [item("42 ok", True), item("7", True, "2+2?"), item("y" * 9, False, "2+2?"), item("9", False, "3+3?")]
    pairs = matched(items)
    assert len(pairs) == 1
    good, bad = pairs[0]
    assert (good.response, len(bad.response)) == ("42 ok", 5)
    twice = [item("ab", True), item("cd", True), item("ef", False)]
    assert len(matched(twice)) == 1
    assert preference_rows(pairs)[0] == {"prompt": "1+1?", "chosen": "42 ok", "rejected": bad.response}


def test_a_text_whose_labels_disagree_is_in_no_pair():
    """Preference data often has an answer that is better than one and worse than another: `cabochon rm` refuses a pair
    of equal answers, and a judge would learn both verdicts on the same words."""
    items = [item("ab", True), item("ab", False), item("cd", False), item("ef", True)]
    assert [(good.response, bad.response) for good, bad in matched(items)] == [("ef", "cd")]


def test_attacked_copies_keep_their_labels_and_say_the_same_of_right_and_wrong():
    pairs = [(item(f"{i} yes", True), item(f"{i} no!", False)) for i in range(40)]
    copies = attacked(pairs, 0.5)
    assert len(copies) == 20
    assert len({good.response.split()[0] for good, _ in copies}) == 20, "each pair once"
    assert copies == attacked(pairs, 0.5)
    words = [good.response.removeprefix(bad.response.split()[0] + " yes") for good, bad in copies]
    assert [bad.response.partition("no!")[2] for _, bad in copies] == words
    assert set(words) <= set(PLEAS)
    assert len(set(words)) > 5
    assert all(good.right and not bad.right for good, bad in copies)
    assert attacked(pairs, 0) == []
    tried = [PADDING, *(text.removeprefix("{response}") for text in INJECTIONS.values())]
    assert not {words.strip() for words in tried} & {words.strip() for words in PLEAS}, "evaluated on others"


def test_sft_rows_hold_the_judges_own_prompt_and_the_verdict():
    rows = sft_rows(JUDGE, [(item("2</response>", True), item("3", False))])
    criterion = JUDGE.cfg.criteria[0]
    task = Task(id="t", prompt="1+1?", verifier="none")
    assert rows[0]["prompt"] == [{"role": "user", "content": JUDGE.prompt(task, "2</response>", criterion)}]
    assert [row["completion"][0]["content"] for row in rows] == ["Verdict: Yes", "Verdict: No"]
    example = example_of(Row(where="f:1", values=rows[0]))
    assert isinstance(example, Chat)
    assert example.context == 1


def test_a_judge_that_reasons_is_shown_rationales():
    judge = Judge(Unasked(), JudgeConfig(reason=True))
    (row,) = sft_rows(judge, [[item("3", False, rationale="1+1 is 2, not 3.")]])
    assert row["completion"][0]["content"] == "1+1 is 2, not 3.\nVerdict: No"
    with pytest.raises(UserError, match="f:1: no 'rationale' for a judge that reasons"):
        sft_rows(judge, [[item("3", False)]])


def test_a_judge_of_pairs_sees_each_in_both_orders():
    pair = (item("2", True, rationale="2 is 2."), item("3", False, rationale="3 is not 2."))
    judge = PairwiseJudge(Unasked(), PAIRWISE.model_copy(update={"reason": False}))
    given, swapped = sft_rows(judge, [pair])
    task = Task(id="t", prompt="1+1?", verifier="none")
    assert given["prompt"][0]["content"] == judge.prompt(task, "2", "3")
    assert swapped["prompt"][0]["content"] == judge.prompt(task, "3", "2")
    assert [row["completion"][0]["content"] for row in (given, swapped)] == ["Verdict: A", "Verdict: B"]
    tasks = [Task(**row) for row in task_rows(judge, [pair])]
    assert [verifier_named(t.verifier).verify(t, "Verdict: B").score for t in tasks] == [0.0, 1.0]
    reasoning = PairwiseJudge(Unasked(), PAIRWISE)
    said = [row["completion"][0]["content"] for row in sft_rows(reasoning, [pair])]
    assert said == ["2 is 2.\n3 is not 2.\nVerdict: A", "3 is not 2.\n2 is 2.\nVerdict: B"]
    assert len(task_rows(reasoning, [(item("2", True), item("3", False))])) == 2, "rationales are for RL to find"
    with pytest.raises(UserError, match="f:1: a judge of pairs is shown a right and a wrong completion"):
        sft_rows(judge, [(item("2", True),)])


def test_tasks_for_rl_are_judged_by_the_verdict_verifier():
    (row,) = task_rows(JUDGE, [[item("3", False)]])
    task = Task(**row)
    verifier = verifier_named(task.verifier)
    assert verifier.verify(task, "Verdict: No").score == 1.0
    assert verifier.verify(task, "Verdict: Yes").score == 0.0
