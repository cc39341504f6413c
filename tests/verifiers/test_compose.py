"""Composition: numbers worked out by hand, every part visible, a machine failure never a zero."""

from dataclasses import dataclass, field

import pytest

from cabochon.types import Task, Verdict
from cabochon.verifiers.compose import AllOf, ByTask, Gate, Part, WeightedSum

TASK = Task(id="c", prompt="", verifier="maths")
OK = Verdict(score=1.0, status="ok", seconds=0.5)
HALF = Verdict(score=0.5, status="wrong", detail="half", evidence={"passed": 1}, seconds=0.25)
WRONG = Verdict(score=0.0, status="wrong", detail="no")
ABSTAINS = Verdict(score=None, status="ok")
BROKEN = Verdict(score=None, status="infra_error", detail="engine gone")


@dataclass(frozen=True)
class Says:
    verdict: Verdict
    asked: list[str] = field(default_factory=list)

    def verify(self, task: Task, text: str) -> Verdict:
        self.asked.append(text)
        return self.verdict


def part(name: str, verdict: Verdict, weight: float = 1.0) -> Part:
    return Part(name=name, verifier=Says(verdict), weight=weight)


def test_weighted_sum() -> None:
    found = WeightedSum(parts=(part("a", OK, 3), part("b", HALF, 1))).verify(TASK, "t")
    assert found.score == pytest.approx((3 * 1 + 1 * 0.5) / 4)
    assert (found.status, found.detail, found.seconds) == ("wrong", "b: half", 0.75)
    assert found.evidence["parts"]["b"] == {
        "score": 0.5,
        "status": "wrong",
        "detail": "half",
        "evidence": {"passed": 1},
    }


def test_a_part_that_abstains_takes_its_weight_with_it() -> None:
    assert WeightedSum(parts=(part("a", HALF, 1), part("b", ABSTAINS, 9))).verify(TASK, "t").score == 0.5
    alone = WeightedSum(parts=(part("b", ABSTAINS),)).verify(TASK, "t")
    assert (alone.score, alone.status) == (None, "ok")


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightedSum(parts=(part("a", WRONG), part("b", BROKEN))),
        lambda: AllOf(parts=(part("a", WRONG), part("b", BROKEN))),
        lambda: Gate(gate=part("a", BROKEN), content=part("b", OK)),
        lambda: Gate(gate=part("a", OK), content=part("b", BROKEN)),
    ],
)
def test_a_broken_part_leaves_no_score(make) -> None:
    found = make().verify(TASK, "t")
    assert (found.score, found.status) == (None, "infra_error")
    assert found.detail.endswith("engine gone")


def test_all_of() -> None:
    assert AllOf(parts=(part("a", OK), part("b", OK))).verify(TASK, "t").score == 1.0
    found = AllOf(parts=(part("a", OK), part("b", HALF))).verify(TASK, "t")
    assert (found.score, found.status) == (0.0, "wrong")
    assert set(found.evidence["parts"]) == {"a", "b"}


def test_gate() -> None:
    content = Says(HALF)
    shut = Gate(gate=part("form", WRONG), content=Part(name="answer", verifier=content)).verify(TASK, "t")
    assert (shut.score, content.asked) == (0.0, [])
    assert set(shut.evidence["parts"]) == {"form"}
    opened = Gate(gate=part("form", OK), content=Part(name="answer", verifier=content)).verify(TASK, "t")
    assert (opened.score, content.asked) == (0.5, ["t"])
    low = Gate(gate=part("form", HALF), content=Part(name="answer", verifier=content), threshold=0.5).verify(TASK, "t")
    assert low.score == 0.5


def test_by_task() -> None:
    by_task = ByTask(routes=(("code", Says(WRONG)), ("maths", Says(HALF)), ("maths", Says(OK))))
    assert by_task.verify(TASK, "t").score == 0.5
    with pytest.raises(ValueError, match=r"'mathz'.*nearest is 'maths'"):
        by_task.verify(Task(id="c", prompt="", verifier="mathz"), "t")


def test_they_nest() -> None:
    inner = AllOf(parts=(part("a", OK), part("b", WRONG)))
    found = WeightedSum(parts=(Part(name="inner", verifier=inner), part("c", OK))).verify(TASK, "t")
    assert found.score == 0.5
    assert found.evidence["parts"]["inner"]["evidence"]["parts"]["b"]["detail"] == "no"


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightedSum(parts=(part("a", OK, 0.0),)),
        lambda: WeightedSum(parts=(part("a", OK, float("inf")),)),
        lambda: WeightedSum(parts=(part("a", OK, 1e308), part("b", OK, 1e308))),
        lambda: AllOf(parts=()),
        lambda: AllOf(parts=(part("a", OK), part("a", OK))),
        lambda: ByTask(routes=()),
        lambda: Gate(gate=part("a", OK), content=part("b", OK), threshold=0.0),
    ],
)
def test_nonsense_is_refused(make) -> None:
    with pytest.raises(ValueError):
        make()
