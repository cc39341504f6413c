"""From an answer as written to tokens: LaTeX and plain text, normalised to one small vocabulary. Standard library
only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cabochon.verifiers.math_forms import turned_brackets, usual

LENGTH_LIMIT = 4_000
"""A longer final answer is not one."""

TOKEN_LIMIT = 1_500


class MathSyntaxError(ValueError):
    """The answer cannot be read as mathematics."""


@dataclass(frozen=True, slots=True)
class Token:
    kind: Literal["number", "based", "letter", "word", "function", "command", "op", "text", "end"]
    value: str


_UNICODE = str.maketrans({
    "−": "-", "–": "-", "—": "-", "×": r" \times ", "·": r" \cdot ", "⋅": r" \cdot ", "÷": " / ", "∕": "/", "⁄": "/",
    "≤": r" \le ", "≥": r" \ge ", "≠": r" \ne ", "≈": r" \approx ", "∞": r" \infty ", "π": r" \pi ", "θ": r" \theta ",
    "α": r" \alpha ", "β": r" \beta ", "γ": r" \gamma ", "λ": r" \lambda ", "μ": r" \mu ", "σ": r" \sigma ",
    "φ": r" \phi ", "ω": r" \omega ", "δ": r" \delta ", "√": r" \sqrt ", "∪": r" \cup ", "∩": r" \cap ",
    "∈": r" \in ", "∅": r" \emptyset ", "°": r" ^\circ ", "±": r" \pm ", "ℝ": r" \R ", "ℤ": r" \Z ", "ℕ": r" \N ",
    "ℚ": r" \Q ", 
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "⟨": r"\langle ",
    "⟩": r"\rangle ", "’": "'", "‘": "'", "′": "'", "\u00a0": " ", "\u202f": " ", "\u2009": " ", "，": ",", "：": ":",
    "－": "-", "＋": "+", "＝": "=",
    "（": "(", "）": ")", "\ufeff": "", "\u200b": "", "∨": r" \lor ", "∧": r" \land ", "→": r" \to ",
    "∖": r" \setminus ",
})

_IN_TEXT = {sign: latex for sign, latex in _UNICODE.items() if chr(sign) not in "–—°’‘"}
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_LEVEL = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789-+n0123456789")

_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("__", "__"), ("`", "`"),
             ("<b>", "</b>"), ("<strong>", "</strong>"))

_SPACING = re.compile(
    r"\\(?:displaystyle|textstyle|limits|nolimits|left|right|[Bb]igg?[lrm]?|middle|qquad|quad|hspace\{[^{}]*\}|phantom\{[^{}]*\}"
    r"|hfill|noindent|strut|mathstrut)(?![A-Za-z])|(?<!\\)\\[,;:!>]|~"
)


def signs(text: str, *, alone: bool = True) -> str:
    """Mathematical signs of Unicode as LaTeX. `alone`: it is all mathematics, where a long dash is a minus, too."""
    text = _RAISED.sub(lambda run: "^{" + run.group().translate(_LEVEL) + "}", text)
    text = _LOWERED.sub(lambda run: "_{" + run.group().translate(_LEVEL) + "}", text)
    return text.translate(_UNICODE if alone else _IN_TEXT)


def clean(text: str) -> str:
    """The answer without the markup that carries no meaning. Raises MathSyntaxError when it is far too long."""
    if len(text) > LENGTH_LIMIT:
        raise MathSyntaxError(f"the answer is {len(text)} characters long")
    text = " ".join(signs(text).split())
    if re.search(r"~~[^~]+~~", text):
        raise MathSyntaxError("struck out")
    if _TO_DERIVE.search(text):
        raise MathSyntaxError("a derivative that is not worked out")
    text = _DRESS.sub("", text)
    changed = True
    while changed:
        changed = False
        for opening, closing in _WRAPPERS:
            inner = text[len(opening) : len(text) - len(closing)]
            if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing) \
                    and opening not in inner and not (opening == "$" and inner.endswith("\\")):
                text, changed = inner.strip(), True
        if (box := re.fullmatch(r"\\(?:boxed|fbox)\s*\{(.*)\}", text, re.DOTALL)) and _balanced(box.group(1)):
            text, changed = box.group(1).strip(), True
        if (said := _ALL_TEXT.fullmatch(text)) and re.search(r"\d", said.group(1)):
            text, changed = said.group(1).strip(), True
        if text and text[-1] in ".," and not text.endswith((r"\,", "..")):
            text, changed = text[:-1].rstrip(), True
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,|\\!,|,\\!|\{\s\}|\\ )(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"\\left\s*\.|\\right\s*\.", " ", text)
    text = _SPACING.sub(" ", usual(text))
    text = turned_brackets(re.sub(r"(?<!\\)\\ ", " ", text))
    text = re.sub(r"(?<=[)\]])\s*U\s*(?=[(\[])", r" \\cup ", text)
    text = _REPEATING.sub(_repeating, text)
    text = _INFIX.sub(_prefixed, text)
    text = _MODULO.sub(r" \\pmod{\1}", text)
    text = _BASE_WORDS.sub(_based, text)
    text = _DERIVATIVE.sub(lambda name: (name.group(1) or name.group(2)) + "'", text)
    text = text.replace(r"\%", "%").replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}")
    text = text.replace(r"\lvert", "|").replace(r"\rvert", "|").replace(r"\vert", "|").replace(r"\mid", "|")
    return " ".join(re.sub(r"\\(?:dfrac|tfrac|cfrac)(?![A-Za-z])", r"\\frac", text).split())


_DERIVATIVE = re.compile(
    r"\\[dt]?frac\s*\{\s*d\s*([a-z])\s*\}\s*\{\s*d\s*[a-z]\s*\}|(?<![A-Za-z])d([a-z])/d[a-z](?![A-Za-z])"
)
"""`dy/dx` is one name, not y over x."""

_TO_DERIVE = re.compile(
    r"\\[dtc]?frac\s*\{\s*d\s*(?:\^\{?\w\}?)?\s*\}\s*\{\s*d\s*[a-z]|(?<![A-Za-z])d/d[a-z](?![a-z])"
)
"""`d/dx` before something is work to be done; as a fraction it would cancel: d/(dx) x^2 = x."""
_DRESS = re.compile(
    r"\\(?:text)?color\s*\{[a-zA-Z]{1,20}\}|\\(?:underline|bf|rm|it|enspace|thinspace)(?![A-Za-z])"
    r"|\\(?:blacksquare|square|qed)?\s*$"
)
_ALL_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_INFIX = re.compile(r"\{([^{}\\]{1,40})\\(over|choose)(?![A-Za-z])([^{}\\]{1,40})\}")
_MODULO = re.compile(r"\(?\\(?:pmod|bmod|mod)\s{0,3}\{?(\w{1,20})\}?\)?")


def _prefixed(match: re.Match[str]) -> str:
    r"""`{1 \over 2}` as `\frac{1}{2}`, `{7 \choose 3}` as `\binom{7}{3}`."""
    top, name, bottom = match.groups()
    return rf"\{'frac' if name == 'over' else 'binom'}{{{top}}}{{{bottom}}}"


BASE_NAMES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
               "twelve": 12, "sixteen": 16}
_BASE_WORDS = re.compile(
    r"\b([0-9A-Za-z]+)(?:_\s*\{?\s*\\(?:text|mathrm)\s*\{\s*([a-z]+)\s*\}\s*\}?|\s*\(?\s*(?:in\s)?base[ -](\w+)\s*\)?)$"
    r"|^0([xXbBoO])([0-9A-Fa-f]+)$"
)


def _based(match: re.Match[str]) -> str:
    """`1011 (base 2)`, `1011_{\\text{two}}` and `0b1011` as `1011_{2}`."""
    digits, name, word, mark, literal = match.groups()
    if mark:
        return f"{literal.upper()}_{{{ {'x': 16, 'b': 2, 'o': 8}[mark.lower()] }}}"
    name = name or word
    base = BASE_NAMES.get(name, int(name) if name.isdigit() and len(name) < 3 else 0)
    return f"{digits.upper()}_{{{base}}}" if base else match.group()


_REPEATING = re.compile(r"(\d{0,50})\.(\d{0,50})\\(?:overline|bar)\s*\{\s*(\d{1,50})\s*\}")


def _repeating(match: re.Match[str]) -> str:
    """`0.1\\overline{6}` as the fraction it is."""
    whole, fixed, period = match.groups()
    top = int((whole + fixed + period) or "0") - int((whole + fixed) or "0")
    return rf"{{\frac{{{top}}}{{{10 ** len(fixed) * (10 ** len(period) - 1)}}}}}"


def _balanced(text: str) -> bool:
    depth = 0
    for mark in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += (mark == "{") - (mark == "}")
        if depth < 0:
            return False
    return depth == 0


_TOKEN = re.compile(
    r"(?P<space>\s+)"
    r"|(?P<based>(?=[0-9A-Z]*[A-Z])[0-9A-Z]{2,}_(?:\{\s*)?(?:1[1-9]|2\d|3[0-6])(?!\d)(?:\s*\})?)"
    r"|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+(?![\d.a-zA-Z]))?)"
    r"|(?P<text>\\(?:text|textbf|textit|textrm|textsf|mbox|mathrm|mathbf|mathit|mathsf|operatorname\*?|mathop)\s*"
    r"\{(?P<inside>[^{}\\$]*)\})"
    r"|(?P<double>\\(?:mathbb|mathcal)\s*\{?\s*(?P<set>[A-Z])\}?)"
    r"|(?P<environment>\\(?:begin|end)\s*\{(?P<name>[A-Za-z]+\*?)\}(?:\{[clr|]*\})?)"
    r"|(?P<command>\\[A-Za-z]+\*?)"
    r"|(?P<escaped>\\[{}|\\_&#$])"
    r"|(?P<letters>[A-Za-z]+)"
    r"|(?P<op>\*\*|<=|>=|!=|==|[-+*/^_=<>!%|()\[\]{},;:'&])"
    r"|(?P<other>.)",
    re.DOTALL,
)

FUNCTIONS = frozenset(
    ["sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "coth", "asin",
     "acos", "atan", "ln", "log", "exp", "lg", "sqrt", "abs", "gcd", "lcm", "max", "min", "floor", "ceil", "cbrt"]
)
CONSTANTS = {"pi": r"\pi", "infinity": r"\infty", "inf": r"\infty", "oo": r"\infty", "infty": r"\infty"}
GREEK = frozenset(
    ["alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota", "kappa",
     "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "upsilon", "phi", "varphi", "chi", "psi", "omega", "Gamma",
     "Delta", "Theta", "Lambda", "Xi", "Sigma", "Phi", "Psi", "Omega", "ell", "hbar"]
)
CONNECTIVES = {"and": "and", "or": "or", "in": r"\in", "cup": r"\cup", "union": r"\cup", "U": r"\cup", "cap": r"\cap"}
_SHORT_WORDS = frozenset(
    ["yes", "no", "dne", "odd", "even", "one", "two", "six", "ten", "not", "all", "any", "the", "none", "both",
     "only", "is", "are", "of", "to", "at", "by", "for", "on", "as", "it", "be", "he", "she", "his", "her", "man",
     "day", "mon", "tue", "wed", "thu", "fri", "sat", "sun", "am", "pm", "red"]
)


def _letters(run: str) -> list[Token]:
    """A run of bare letters: a function, a connective, a word, or a product of variables."""
    if run in FUNCTIONS:
        return [Token("function", run)]
    if run in CONSTANTS:
        return [Token("command", CONSTANTS[run])]
    if run in GREEK:
        return [Token("command", "\\" + run)]
    if run in CONNECTIVES and len(run) > 1:
        return [Token("op", CONNECTIVES[run])]
    if len(run) == 1:
        return [Token("letter", run)]
    titled = len(run) >= 3 and run[0].isupper() and run[1:].islower()
    if len(run) >= 4 or titled or run.lower() in _SHORT_WORDS:
        return [Token("word", run)]
    return [Token("letter", letter) for letter in run]


def _roman(inside: str) -> list[Token]:
    """What stands in `\\text{...}` or `\\mathrm{...}`: a connective, a function, one letter, or words."""
    inside = inside.strip()
    if not inside:
        return []
    if inside.lower() in ("and", "or", "in"):
        return [Token("op", CONNECTIVES[inside.lower()])]
    if inside in FUNCTIONS:
        return [Token("function", inside)]
    if len(inside) == 1 and inside.isalpha():
        return [Token("letter", inside)]
    if re.fullmatch(r"[-+]?\d+(?:\.\d+)?", inside):
        return tokenise(inside)[:-1]
    return [Token("text", " ".join(inside.split()))]


def tokenise(text: str) -> list[Token]:
    """Tokens of cleaned text, closed by an `end` token. Raises MathSyntaxError for what is not mathematics."""
    tokens: list[Token] = []
    for match in _TOKEN.finditer(text):
        kind, value = match.lastgroup, match.group()
        if match.group("text") is not None:
            tokens += _roman(match.group("inside"))
        elif match.group("double") is not None:
            tokens.append(Token("command", "\\" + match.group("set")))
        elif match.group("environment") is not None:
            tokens.append(Token("command", value.split("{")[0].strip() + ":" + match.group("name")))
        elif kind == "letters":
            tokens += _letters(value)
        elif kind == "command":
            name = value[1:]
            tokens.append(Token("function", name) if name in FUNCTIONS and name != "sqrt" else Token("command", value))
        elif kind == "number":
            tokens.append(Token("number", value))
        elif kind == "based":
            tokens.append(Token("based", value.replace(" ", "")))
        elif kind in ("op", "escaped"):
            tokens.append(Token("op", value))
        elif kind == "other":
            raise MathSyntaxError(f"unexpected character {value!r}")
        if len(tokens) > TOKEN_LIMIT:
            raise MathSyntaxError(f"the answer has more than {TOKEN_LIMIT} symbols")
    tokens.append(Token("end", ""))
    return tokens
