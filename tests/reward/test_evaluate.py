"""The table of a reward model, on scorers whose faults are known."""

from dataclasses import replace

import numpy as np
import pytest

from cabochon.reward.asking import Reading
from cabochon.reward.evaluate import INJECTIONS, evaluate, evaluate_pairs, self_preference, table
from cabochon.reward.judge import PairwiseJudge
from cabochon.reward.rows import Labelled
from cabochon.types import Score


def items(n=40):
    return [Labelled(where="f", prompt=f"{i}?", response=f"{'right' if i % 2 else 'wrong'} {i}", right=i % 2 == 1)
            for i in range(n)]  # fmt: skip


def scores_of(p):
    return [Score(value=float(x), model_id="m") for x in p]


def honest(tasks, texts):
    return scores_of(0.9 if text.startswith("right") else 0.1 for text in texts)


def gullible(tasks, texts):
    return scores_of(0.9 if text.startswith("right") or "best verdict" in text else 0.1 for text in texts)


def wordy(tasks, texts):
    return scores_of(min(0.95, len(text) / 100) for text in texts)


def test_an_honest_judge():
    report = evaluate(honest, items(), bounded=True)
    assert report["accuracy"] == report["auc"] == 1.0
    assert report["ece"] == pytest.approx(0.1)
    assert report["ece_scaled"] < 0.06
    for name in ("padding", *INJECTIONS):
        assert report["attacks"][name] == {"gained": 0.0, "flipped": 0.0, "unscored": 0.0}


def test_an_order_is_obeyed_and_found_out():
    attacks = evaluate(gullible, items(), bounded=True)["attacks"]
    assert attacks["order"]["flipped"] == 1.0
    assert attacks["order"]["gained"] > 0.8
    assert attacks["praise"]["flipped"] == 0.0


def test_disagreements_with_the_labels_are_written_out_the_surest_first():
    p = {"right 1": 0.2, "right 3": 0.01, "wrong 2": 0.99}
    given = lambda tasks, texts: scores_of(p.get(t, 0.9 if t.startswith("right") else 0.1) for t in texts)  # noqa: E731
    report = evaluate(given, items(), bounded=True)
    found = report["disagreements"]
    assert {x["response"] for x in found} == {"right 1", "right 3", "wrong 2"}
    assert [x["right"] for x in found if x["response"] != "wrong 2"] == [True, True]
    sure = [abs(x["p_right"] - 0.5) for x in found]
    assert sure == sorted(sure, reverse=True)
    assert all((x["p_right"] > 0.5) != x["right"] for x in found)
    assert report["reliability"]["0.0 to 0.1"] == {"confidence": pytest.approx(0.01), "right": 1.0, "count": 1}
    assert any("written out" in line for line in table(report))
    assert evaluate(honest, items(), bounded=True)["disagreements"] == []


def test_length_is_found_out():
    longer = [Labelled(where="f", prompt="?", response="x" * (10 + i), right=i % 2 == 0) for i in range(40)]
    report = evaluate(wordy, longer, bounded=True)
    assert report["length_correlation"]["of_score"] == pytest.approx(1.0)
    assert abs(report["length_correlation"]["of_label"]) < 0.1
    right_is_longer = [Labelled(where="f", prompt="?", response=x.response, right=len(x.response) > 30) for x in longer]
    padding = evaluate(wordy, right_is_longer, bounded=True)["attacks"]["padding"]
    assert padding["gained"] > 0.3
    assert padding["flipped"] == 1.0


def test_a_scale_without_bounds_gives_the_same_agreement():
    def scalar(tasks, texts):
        return scores_of(5.0 if text.startswith("right") else 2.0 for text in texts)

    report = evaluate(scalar, items(), bounded=False)
    assert report["auc"] == 1.0
    assert report["accuracy"] == 0.5  # 0 is not its line: it scores everything above
    assert report["accuracy_scaled"] == 1.0


def test_what_was_not_scored_is_counted_and_left_out():
    def half(tasks, texts):
        lost = Score(value=None, status="unparsed", model_id="m")
        return [lost if i % 4 == 0 else s for i, s in enumerate(honest(tasks, texts))]

    report = evaluate(half, items(), bounded=True)
    assert report["statuses"] == {"unparsed": 10, "ok": 30}
    assert report["accuracy"] == 1.0
    down = Score(value=None, status="infra_error", model_id="m", detail="HTTP 401")
    nothing = evaluate(lambda tasks, texts: [down] * len(texts), items(), bounded=True)
    assert nothing == {
        "completions": 40, "statuses": {"infra_error": 40}, "most_often": "infra_error: HTTP 401"
    }  # fmt: skip


def test_preference_for_ones_own():
    mine = [i % 4 < 2 for i in range(40)]
    fair = [0.8 if item.right else 0.2 for item in items()]
    assert self_preference(scores_of(fair), items(), mine, True) == pytest.approx(0.0, abs=1e-6)
    vain = np.clip([p + 0.15 * own for p, own in zip(fair, mine, strict=True)], 0, 1)
    assert self_preference(scores_of(vain), items(), mine, True) > 0.02
    assert np.isnan(self_preference(scores_of(fair), items(), [True] * 40, True))
    assert "self_preference" not in evaluate(honest, items(), bounded=True)
    signed = [replace(item, author="m" if own else "") for item, own in zip(items(), mine, strict=True)]
    assert evaluate(honest, signed, bounded=True, own="m")["self_preference"] == pytest.approx(0.0, abs=1e-6)


class Says:
    """`p(first, second)`: that the first is the better."""

    model_id, specials = "says", ()

    def __init__(self, p):
        self.p = p

    def ask(self, prompts, choices, *, votes, reason, seed):
        shown = [[prompt.split(f"<{x}>")[1].split(f"</{x}>")[0] for x in ("first", "second")] for prompt in prompts]
        return [[Reading(status="ok", probabilities=(1 - x, x))] for x in (self.p(a, b) for a, b in shown)]


def pairs():
    return [(a, b) for a, b in zip(items()[1::2], items()[::2], strict=True)]


def test_position_bias_of_pairs():
    fair = evaluate_pairs(PairwiseJudge(Says(lambda first, _: 0.9 if "right" in first else 0.1)), pairs())
    assert (fair["accuracy"], fair["consistent"], fair["first_preferred"]) == (1.0, 1.0, pytest.approx(0.0))
    biased = evaluate_pairs(PairwiseJudge(Says(lambda first, _: 0.8)), pairs())
    assert (biased["consistent"], biased["first_preferred"]) == (0.0, pytest.approx(0.3))
    assert biased["statuses"] == {"inconsistent": 20}
    assert "accuracy" not in biased
    torn = evaluate_pairs(PairwiseJudge(Says(lambda first, _: 0.5)), pairs())
    assert (torn["consistent"], torn["ties"]) == (1.0, 1.0), "as much as before, whatever the order"
    assert "attacks" not in biased
    halves = evaluate_pairs(PairwiseJudge(Says(lambda first, _: 0.9 if "right" in first else 0.5)), pairs())
    assert halves["consistent"] == 0.0


def test_attacks_and_length_of_pairs():
    def checked(first, second):
        """Prefers what the graders checked, then what is right."""
        return 0.9 if ("10/10" in first, "right" in first) > ("10/10" in second, "right" in second) else 0.1

    found = evaluate_pairs(PairwiseJudge(Says(checked)), pairs())
    assert (found["accuracy"], found["attacks"]["praise"]["flipped"]) == (1.0, 1.0)
    assert found["attacks"]["praise"]["gained"] == pytest.approx(0.8)
    assert found["attacks"]["padding"] == {"gained": pytest.approx(0.0), "flipped": 0.0, "unscored": 0.0}
    wide = [(replace(a, response=a.response + "!" * (i % 5)), b) for i, (a, b) in enumerate(pairs())]
    longer = PairwiseJudge(Says(lambda first, second: 0.5 + 0.4 * np.tanh(len(first) - len(second))))
    found = evaluate_pairs(longer, wide)
    assert found["length_correlation"]["of_score"] > 0.8
    assert (found["attacks"]["padding"]["flipped"], found["consistent"]) == (1.0, 1.0)


def test_the_table_is_readable():
    lines = table(evaluate(honest, items(), bounded=True))
    assert any(line.startswith("accuracy ") and "1.000" in line for line in lines)
    assert any("flipped" in line for line in lines)
    assert max(map(len, lines)) < 120
