"""Is a judge's verdict right? The verifiable reward that a judge is trained with: labels come from verifiers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cabochon.types import Task, Verdict
from cabochon.verifiers.base import right, wrong


@dataclass(frozen=True, kw_only=True)
class VerdictVerifier:
    """Scores 1 where the last line is `Verdict: LABEL` and LABEL is `payload["label"]`, else 0.

    `payload["choices"]` are the answers a judge may give; anything else is no answer. Thinking is passed over, and one
    that never ends is no answer.
    """

    closing: str = "</think>"
    opening: str = "<think>"

    def verify(self, task: Task, text: str) -> Verdict:
        """Raises ValueError where the payload has no label, or one that is not among its choices."""
        label, choices = label_and_choices(task)
        answer = text.rpartition(self.closing)[2]
        if self.closing not in text and self.opening in text:
            return Verdict(score=0.0, status="no_answer", detail="thinking never ends")
        line = (answer.strip().splitlines() or [""])[-1].strip()[:500].casefold()
        fits = [c for c in choices if re.fullmatch(rf"\W*verdict:\W*{_whole(c.casefold())}\W*", line)]
        said = max(fits, key=len, default=None)  # "-1" and not "1", whose sign would be mere decoration
        if said is None:
            return Verdict(score=0.0, status="no_answer", detail=f"the last line is not 'Verdict: {'|'.join(choices)}'")
        evidence = {"verdict": said, "label": label}
        return right(f"{said}, as it is", evidence) if said == label else wrong(f"{said}, it is {label}", evidence)


def label_and_choices(task: Task) -> tuple[str, list[str]]:
    """The right label and all there are. Raises ValueError where it is not among them."""
    given = task.payload.get("choices") or []
    if not isinstance(given, list | tuple):
        raise ValueError(f"task {task.id}: payload.choices must be a list, got {str(given)[:60]!r}")
    label, choices = task.payload.get("label"), [str(choice) for choice in given]
    if label not in choices:
        raise ValueError(f"task {task.id}: payload.label must be one of payload.choices {choices}, got {label!r}")
    return str(label), choices


def _whole(name: str) -> str:
    """As in `cabochon.reward.answers`: right before a number no sign or point, which would make it another, and before
    none what denies it."""
    return (r"(?<![-−+.,<>≤≥~≈≠¬!])" if name[:1].isdigit() else r"(?<![≠¬!~])") + re.escape(name)
