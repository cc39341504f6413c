"""What a judge is shown: templates, and text of strangers made safe to show.

A template is a Jinja file: `task`, `reference`, `criterion`, `choices`, `reason` (is a rationale wanted?) and
`response`, or `first` and `second` for pairs. Shipped ones lie in `reward/templates`. What a policy wrote may try to
end its own place in the prompt, to write a verdict, or to open a turn of the chat: `untrusted` takes that away.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox

from cabochon.errors import UserError
from cabochon.tokenizer import Tokenizer
from cabochon.types import Prompt

TEMPLATES = Path(__file__).resolve().parent / "templates"
MARK = "Verdict:"
"""what stands before a verdict"""
CUT = "\n[... cut ...]\n"

_TAGS = re.compile(r"<\s*(?:/\s*)?(task|reference|response|first|second)\b[^<>]*>", re.IGNORECASE)
_VERDICTS = re.compile(r"verdict\W{0,3}[:=][^\n]*", re.IGNORECASE)
_VARIABLES = {"task", "reference", "criterion", "choices", "reason"}


@dataclass(frozen=True, kw_only=True)
class Template:
    """A judge's prompt, for one response or for two."""

    name: str
    text: str
    pair: bool

    @classmethod
    def load(cls, name: str, *, pair: bool = False) -> Template:
        """A shipped template by name, or a file. Raises UserError: no such file, not Jinja, a placeholder that is
        missing or unknown."""
        path = Path(name) if name.endswith(".jinja") else TEMPLATES / f"{name}.jinja"
        if not path.is_file():
            shipped = ", ".join(sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
            raise UserError(f"{name}: no such judge template; shipped: {shipped}; or give the path of a .jinja file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
        try:
            used = jinja2.meta.find_undeclared_variables(_environment().parse(text))
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{path}:{error.lineno}: the judge template does not parse: {error.message}") from None
        needed = {"first", "second"} if pair else {"response"}
        if lost := sorted(needed - used):
            hint = "; for pairs set judge.template=pairwise or terse-pair" if pair else ""
            raise UserError(f"{path}: the judge template has no {{{{ {lost[0]} }}}}: the judge would not see it{hint}")
        if odd := sorted(used - needed - _VARIABLES):
            known = ", ".join(sorted(needed | _VARIABLES))
            raise UserError(f"{path}: the judge template reads {odd[0]!r}, which nobody sets; known: {known}")
        return cls(name=name, text=text, pair=pair)

    def check(self, criterion: str, choices: Sequence[str], reason: bool) -> None:
        """One rendering for show: a template may fail at what it does, or ask for a response only to count its letters.
        Raises UserError."""
        shown = ("first", "second") if self.pair else ("response",)
        given = {"task": "task", "reference": "", "criterion": criterion, "choices": tuple(choices), "reason": reason}
        try:
            text = self.render(given | {name: f"[{name}]" for name in shown})
        except Exception as error:  # a template is a program, and may raise anything
            why = " ".join(str(error).split())
            raise UserError(f"{self.name}: the judge template fails: {type(error).__name__}: {why}") from None
        if lost := [name for name in shown if f"[{name}]" not in text]:
            when = f"where reason is {str(reason).lower()}"
            raise UserError(f"{self.name}: the judge template does not write {{{{ {lost[0]} }}}} {when}; write it")

    def render(self, values: Mapping[str, Any]) -> str:
        return _environment().from_string(self.text).render(**values).strip()


def _environment() -> jinja2.Environment:
    return jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )


def special_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Texts that the tokenizer would turn into special tokens: the ends of turns among them. Runs of spaces, which
    some tokenizers (GPT-NeoX's, OLMo's) have as such tokens too, are no more than that, and indent programs."""
    texts = {added.content for added in tokenizer.core.get_added_tokens_decoder().values()}
    return tuple(sorted((text for text in texts if text.strip()), key=len))


def unicode(text: str) -> str:
    """The text without lone surrogates, which no tokenizer takes and JSON may bring."""
    return text.encode("utf-8", "replace").decode("utf-8")


def untrusted(text: str, specials: tuple[str, ...] = (), *, cap: int = 8000) -> str:
    """Text of a stranger that can neither leave its place nor give a verdict; `cap` characters of it at most.

    Of a long text the beginning and the end are kept. Then special tokens, the templates' tags and what follows
    `verdict:` on a line are taken out, until none is left: taking one out may join two halves of another, and so may
    the cut. A pass may free one more, so it is the cap that bounds the time.
    """
    text = unicode(text)
    if len(text) > cap:
        text = text[: cap // 2] + CUT + text[len(text) - (cap - cap // 2) :]
    longest_first = sorted(specials, key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    before = None
    while text != before:
        before = text
        text = _VERDICTS.sub("", _TAGS.sub("", special.sub("", text)))
    return text.strip()


def without_thinking(text: str, opening: str = "<think>", closing: str = "</think>") -> str:
    """What follows the thinking; nothing where it never ended."""
    if closing in text:
        return text.rpartition(closing)[2]
    return text.partition(opening)[0]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as the text a judge reads: of a conversation its turns, named where there is more than one."""
    if isinstance(prompt, str):
        return prompt
    turns = [(m["role"], str(m.get("content") or "")) for m in prompt]
    return turns[0][1] if len(turns) == 1 else "\n\n".join(f"[{role}]\n{content}" for role, content in turns)
