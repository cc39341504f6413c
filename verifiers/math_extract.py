"""Finding the final answer in a completion. Linear in the text, standard library only, and it never raises.

Order matters more than cleverness: the *last* box of the final part wins, and text inside the thinking part does not
count when something follows it, so that a model cannot score by listing candidates on the way. Boxes that are joined
(`\\boxed{2} or \\boxed{3}`) are one answer.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Literal

from cabochon.verifiers.math_boxes import Found, last_box
from cabochon.verifiers.math_prose import last_expression, last_match, trim

Method = Literal["boxed", "answer_tag", "hashes", "answer_is", "last_expression"]

TEXT_LIMIT = 400_000
"""Only this many characters at the end of a completion are searched; an answer stands at the end."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Where answers are looked for: each method in turn, the first that finds one decides."""

    methods: tuple[Method, ...] = ("boxed", "answer_tag", "hashes", "answer_is", "last_expression")
    think_close: str = "</think>"
    """end of the thinking part; empty if there is none"""
    require_final_part: bool = False
    """True: text that ends inside the thinking part has no answer; False: then all of it is searched"""


def final_part(text: str, rules: Extraction) -> str:
    """What follows the thinking part, or all of the text when nothing does."""
    if not rules.think_close:
        return text
    _, mark, after = text.rpartition(rules.think_close)
    open_tag = rules.think_close.replace("/", "", 1)
    if mark and after.strip():
        said, again, _ = after.partition(open_tag)
        return said if again and said.strip() else after  # thoughts that begin anew after the answer
    if text.count(rules.think_close) > 1:  # and that end where the text does
        said, *more = text.split(rules.think_close)[1:]
        said = "\n".join(part.partition(open_tag)[0] for part in (said, *more))
        if said.strip():
            return said
    if rules.require_final_part and (mark or open_tag in text):
        return ""
    return text


_END_OF_TURN = re.compile(r"</s>|<\|(?:im_end|endoftext|end_of_text|eot_id|end)\|>|<end_of_turn>|<｜end▁of▁sentence｜>")
_END_MARKS = re.compile(r"(?:<\|[a-z_]{1,30}\|>\s{0,9})+\Z")
"""Special tokens that a completion was decoded with."""
_NEXT_QUESTION = re.compile(
    r"\n[ \t]*(?:#{1,4} |\*\*)?(?:(?:(?:Next )?(?:Question|Problem|Exercise|Example)(?: \d{1,3})?|Human|User|Q\d{0,3})"
    r" ?(?:\*\*)?[:：]|(?:Question|Problem|Exercise) \d{1,3}\b)"
)


def extract(text: str, rules: Extraction = Extraction()) -> Found | None:
    """The final answer in `text`, or None."""
    turn = next((part for part in _END_OF_TURN.split(text[-TEXT_LIMIT:]) if part.strip()), "")
    part = final_part(turn, rules)
    part = part[:-200] + _END_MARKS.sub("", part[-200:])
    named = tuple(method for method in rules.methods if method != "last_expression")
    for begins in itertools.islice(_NEXT_QUESTION.finditer(part), 8):  # a base model goes on with another question
        if (found := _by(named, part[: begins.start()])) is not None:
            return found
    return _by(rules.methods, part)


def _by(methods: tuple[Method, ...], part: str) -> Found | None:
    """What the first of the methods that finds something has found."""
    for method in methods:
        match method:
            case "boxed":
                found = _corrected(part[max(0, part.rfind("boxed")) :], last_box(part))
            case "answer_tag":
                found = _corrected(part.rpartition("<answer>")[2].partition("</answer>")[2], _in_tag(part))
            case "hashes":
                found = _corrected(part.rpartition("####")[2].partition("\n")[2], _after_hashes(part))
            case "answer_is":
                found = _after_phrase(part)
            case "last_expression":
                found = last_expression(part)
        if found is not None:
            return found
    return None


# ---------------------------------------------------------------------------------------------------------- phrases

_HASHES = re.compile(r"^[ \t]*####(?!#)[ \t]*(.*)$", re.MULTILINE)
_PHRASE = re.compile(
    r"\b(?:answers?|result|solutions?|(?:correct|right|best)\s(?:option|choice))\b"
    r"(?:\s+(?:to|for)\s+[^.:\n]{1,80}?)?\s{0,3}(?:\*\*)?\s{0,3}(?:is|are|:|=)"
    r"(?:\s{1,3}(?:therefore|then|thus|hence|simply|exactly|just|indeed|clearly|equal to|given by)\b)?"
    r"\s{0,3}(?:\*\*)?[:=]?[ \t]{0,3}"
    r"|^[ \t]*(?:#{1,6}[ \t]*(?:\*\*)?|\*\*)(?:final )?answer(?:\*\*)?[ \t]*\n\s{0,3}(?:\*\*)?"
    r"(?=\(?[A-J](?:[.:)*]|[ \t]*(?:\n|\Z)))"
    r"|(?:答案|正解|答え)(?:是|为|為|は|：|:)[:：]?\s{0,3}|\b(?:[Оо]твет|답)\s?[:：]\s{0,3}",
    re.IGNORECASE | re.MULTILINE,
)
_NAMED_OPTION = re.compile(
    r"(?:^|[.:\n]\s{0,3}|\b(?:[Ss]o|[Tt]hus|[Hh]ence|[Tt]herefore|[Tt]hat),?\s{1,3})(?:\*\*)?(?:(?:[Tt]he\s)?"
    r"(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s{1,3}(?:\*\*)?\(?([A-J])\)?|\((?=[A-J]\))"
    r"|([A-J])(?=(?:\*\*)?\sis\s(?:the\s(?:correct|right|best)\s(?:answer|option|choice)|correct)\b))(?:(?<=\()([A-J])\))?"
    r"(?:\*\*)?\sis\s(?:the\s)?(?:correct|right|best|answer)(?:\s(?:answer|option|choice|one))?(?:\*\*)?"
    r"(?=[.!]?\s{0,3}(?:\n|$|because|since))"
)
"""`Option B is correct`, `(B) is the answer`, where a sentence says no more."""
_SENTENCE_END = re.compile(r"\n|。|[.!?](?=\s|$)|(?<=\S)\s+\(?(?:because|since|so|which|as)\b")


_STATES = re.compile(
    r"\b(?:is|are|was|were|be|has|have|had|gets?|got|equals?|costs?|spen[dt]s?|paid|pays|earn(?:s|ed)?|makes?|made|needs?"
    r"|takes?|took|will|can|must|left)\s",
    re.IGNORECASE,
)
"""A sentence, of which only the last expression is the answer."""


def _in_tag(text: str) -> Found | None:
    """What the last `<answer>` holds, whether it is closed or generation was stopped at its end."""
    _, opening, rest = text.rpartition("<answer>")
    inside = rest.partition("</answer>")[0].strip()
    if not opening or not inside:
        return None
    if (found := _after_hashes(inside) or _after_phrase(inside)) is not None:
        return found
    if "\n" in inside or _STATES.search(inside):
        return last_expression(inside)
    return Found(answer=_delimited_at_start(inside) or trim(inside), method="answer_tag")


def _after_hashes(text: str) -> Found | None:
    """GSM8K's own form: the rest of the last line that begins with four hashes."""
    lines = _HASHES.findall(text)
    if not lines or not lines[-1].strip():
        return None
    return Found(answer=trim(lines[-1]), method="hashes")


def _after_phrase(text: str) -> Found | None:
    """What stands between the last "the answer is" and the end of its sentence."""
    tail = text[-20_000:]
    last, named = _last_said(tail), last_match(_NAMED_OPTION, tail)
    if named is not None and (last is None or named.start() >= last.start()):
        option = Found(answer=next(filter(None, named.groups())), method="answer_is")
        return _thought_again(tail[named.end() :], option)
    if last is None:
        denied = any(_DENIED.search(tail, max(0, m.start() - 40), m.start()) for m in _PHRASE.finditer(tail))
        return Found(method="answer_is", problem="the text says what the answer is not") if denied else None
    rest = tail[last.end() :].lstrip()[:2000]
    rest = rest[2:].lstrip() if rest.startswith("- ") and tail[last.end() :].lstrip(" \t:*").startswith("\n") else rest
    delimited = _delimited_at_start(rest)
    if delimited is not None:
        return _thought_again(rest, Found(answer=delimited, method="answer_is"))
    end = _SENTENCE_END.search(rest)
    if end and end.group() == "?":
        return None  # it was only asked
    answer = trim(_NOT_ANOTHER.sub("", rest[: end.start()] if end else rest))
    return _thought_again(rest, Found(answer=answer, method="answer_is")) if answer else None


_NOT_ANOTHER = re.compile(r"(?<=\S)(?:(?:,|\s+and|\s*\()\s*not|[\s,(]\s*(?:rather than|instead of))\b.*\Z", re.DOTALL)
"""`42, not 41` says 42."""


_DENIED = re.compile(r"\b(?:wrong|incorrect|false|no way|not|doubt)\s(?:that\s)?(?:the\s)?$", re.IGNORECASE)
_UNSAID = re.compile(
    rf"{_DENIED.pattern}|\b(?:(?:might|may|could|would) think|if)\s(?:that\s)?(?:the\s)?$", re.IGNORECASE
)
"""What stands before an answer that is not given: `the wrong answer is`, `if the answer is`."""
_PLAIN = re.compile(
    r"(?:\*\*)?(?:\\?\$|\\\()?\s?(-?\d(?:[\d,]*\d)?(?:\.\d+)?)(?=(?:\$|\\\)|\*\*)?(?:[.!,]?\s|[.!]?\Z))"
)


_SECOND_THOUGHT = re.compile(
    r"\b(?:[Ww]ait|[Aa]ctually|[Cc]orrection|[Ss]orry|[Oo]ops|[Hh]mm|[Oo]n second thought|[Ss]cratch that|[Mm]y mistake"
    r"|[Nn]o)[,.:;!…—-]{0,3}\s(?:[^\n]{0,200}?\s)?(?:answer|result|it|that)"
    r"(?:['’]s|\s(?:is|was|equals|(?:should|must|would|has to|ought to)\sbe))\s(?:\*\*)?(?:\\?\$|\\\()?\(?"
    r"(-?\d(?:[\d,]*\d)?(?:\.\d+)?|[A-J])\)?(?=(?:\$|\\\)|\*\*)*(?:[.!](?:\s|\Z)|\s{0,3}(?:\n|\Z)))"
)
"""`Wait, it should be 9.`, `Actually, it's C.`"""
_SHORT = re.compile(r"\(?(-?\d(?:[\d,]*\d)?(?:\.\d+)?|[A-J])(?![\d.,/^*\\]\w|[A-Za-z]).*", re.DOTALL)


def _corrected(behind: str, found: Found | None) -> Found | None:
    """An answer with something else that is said to be the answer behind it: two answers."""
    if found is None or found.problem:
        return found
    behind = behind[:20_000]
    others = [other.answer for other in (_in_tag(behind), _after_hashes(behind)) if other is not None]
    if (said := _last_said(behind)) is not None:
        number = _PLAIN.match(behind, said.end()) if re.fullmatch(r"-?\d[\d,.]*", found.answer) else None
        others += [number.group(1)] if number else [_delimited_at_start(behind[said.end() :].lstrip()[:200]) or ""]
    bare = found.answer.replace(",", "")
    other = next((one for one in others if one and "boxed" not in one and one.replace(",", "") != bare), None)
    return _thought_again(behind, found) if other is None else _either(found, other)


def _thought_again(behind: str, found: Found) -> Found:
    """An answer with what the text then says it should be."""
    one, second = _SHORT.fullmatch(found.answer.lstrip("\\$")), last_match(_SECOND_THOUGHT, behind)
    if one is None or second is None or second[1].replace(",", "") == one[1].replace(",", ""):
        return found
    return _either(found, second[1])


def _either(found: Found, other: str) -> Found:
    return Found(answer=rf"{found.answer} \text{{ or }} {other}", method=found.method)


def _last_said(text: str) -> re.Match[str] | None:
    last = None
    for match in _PHRASE.finditer(text):
        if not _UNSAID.search(text, max(0, match.start() - 40), match.start()):
            last = match
    return last


_DELIMITERS = (("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"), ("$", "$"))
_GOES_ON = re.compile(
    r"\s*(?:\*\*)?\s*(?:[,;]?\s*(?:or|and|to)\b|[-–—,;/|&(]?\s*(?:(?:or|maybe|perhaps)\s+)?(?:\$|\\\(|\\\[)"
    r"|[-+*/^=<>,;]\s*[-+]?[\d.]|\\?%|(?:percent|hundred|thousand|million|billion|trillion|dozen|times|maybe|perhaps|alternatively|unless|vs|versus"
    r"|squared|cubed|factorial|if|(?:less|more|fewer|greater)\sthan|short of|pi|over"
    r"|divided|multiplied|mod|modulo|plus|minus|in base|(?:third|fourth|fifth|sixth"
    r"|seventh|eighth|ninth|tenth|hundredth|thousandth|quarter)s?|halves)\b)|[A-Za-z](?![A-Za-z])"
)
"""What follows a `$...$` and changes its value."""


def _unescaped(text: str, mark: str, start: int) -> int:
    """Where `mark` stands next without a backslash before it; -1 if nowhere."""
    at = text.find(mark, start)
    while at > 0 and text[at - 1] == "\\":
        at = text.find(mark, at + 1)
    return at


def _delimited_at_start(rest: str) -> str | None:
    """The content of a `$...$` that the sentence opens with; all of the sentence where the value goes on behind it
    (`$5$ or $6$`, `$5$ million`, `$25$%`)."""
    for opening, closing in _DELIMITERS:
        if rest.startswith(opening) and not re.match(r"\$\d[\d,.]*(?![\d,.]*[^\n$]*\$)", rest):
            end = _unescaped(rest, closing, len(opening))
            if end > 0 and _GOES_ON.match(rest, end + len(closing)):
                stop = _SENTENCE_END.search(rest, end)
                sentence = rest[: stop.start()] if stop else rest
                return trim(re.sub(r"\$|\\[()\[\]]|\*\*", " ", sentence)) or None
            if end > 0:
                return rest[len(opening) : end].strip() or None
    return None
