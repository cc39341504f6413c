"""The form of a completion: thinking tags, and that something follows them. Linear in the text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cabochon.types import Task, Verdict
from cabochon.verifiers.text import blank


@dataclass(frozen=True, kw_only=True)
class ThinkingFormat:
    """Scores 1 for `<think>...</think>` once, first, not empty, and an answer after it; else 0.

    `opened_by_prompt` is for chat templates that end the prompt with the opening tag: the completion then starts inside
    the thinking part. With `answer_tag` the rest must be exactly one `<answer>...</answer>`.
    """

    tag: str = "think"
    opened_by_prompt: bool = False
    answer_tag: str = ""

    def __post_init__(self) -> None:
        for tag in filter(None, (self.tag, self.answer_tag)):
            if not re.fullmatch(r"[A-Za-z][\w-]*", tag):
                raise ValueError(f"a tag is a plain word, got {tag!r}")

    def verify(self, task: Task, text: str) -> Verdict:
        """Judges the form only; the task's payload is not read."""
        problem = self._problem(text)
        if problem:
            return Verdict(score=0.0, status="wrong" if text.strip() else "no_answer", detail=problem,
                           evidence={"format": problem})
        return Verdict(score=1.0, status="ok", detail="in form")

    def _problem(self, text: str) -> str:
        opening, closing = f"<{self.tag}>", f"</{self.tag}>"
        opened = text.count(opening)
        if self.opened_by_prompt and opened == 0:
            text, opened = opening + text, 1
        if opened != 1 or text.count(closing) != 1:
            return f"needs exactly one {opening} and one {closing}, has {opened} and {text.count(closing)}"
        before, _, rest = text.partition(opening)
        thought, closed, answer = rest.partition(closing)
        if before.strip():
            return f"text before {opening}"
        if not closed:
            return f"{closing} before {opening}"
        if blank(thought):
            return "the thinking part is empty"
        if blank(answer):
            return f"nothing after {closing}"
        if self.answer_tag:
            start, end = f"<{self.answer_tag}>", f"</{self.answer_tag}>"
            answer = answer.strip()
            enclosed = answer.startswith(start) and answer.endswith(end)
            if not enclosed or answer.count(start) != 1 or answer.count(end) != 1:
                return f"the answer is not one {start}...{end}"
            if blank(answer[len(start) : -len(end)]):
                return f"{start} is empty"
        return ""
