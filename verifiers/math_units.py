"""Units: what may follow a number, what converts into what. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

_BASE: dict[str, tuple[str, Fraction]] = {}


def _define(dimension: str, **units: str | int) -> None:
    for names, factor in units.items():
        for name in names.split("_"):
            _BASE[name] = (dimension, Fraction(factor))


_define("length", mm_millimeter_millimetre="1/1000", cm_centimeter_centimetre="1/100", dm_decimeter="1/10",
        m_meter_metre=1, km_kilometer_kilometre=1000, inch_inches_in="0.0254", ft_foot_feet="0.3048", yd_yard="0.9144",
        mi_mile="1609.344")
_define("mass", mg_milligram="1/1000000", g_gram="1/1000", kg_kilogram=1, lb_lbs_pound="0.45359237",
        oz_ounce="0.028349523125", ton=1000)
_define("time", ms_millisecond="1/1000", s_sec_second=1, min_minute=60, h_hr_hrs_hour=3600, day=86400, week=604800)
_define("month", month=1, yr_year=12)
_define("money", dollar_usd_buck=1, cent="1/100")
_define("euro", euro=1)
_define("sterling", sterling=1)
_define("yen", yen=1)
_define("rupee", rupee=1)
_define("volume", ml_mL_milliliter_millilitre="1/1000", l_L_liter_litre=1)
_define("angle", degree_deg=1)
_define("unit", unit=1)
_define("energy", J_joule=1, kJ_kilojoule=1000)
_define("force", N_newton=1)
_define("power", W_watt=1, kW_kilowatt=1000)
_define("temperature", celsius=1)
_define("temperature_f", fahrenheit=1)
_CASED = {"L", "mL", "J", "kJ", "N", "W", "kW"}
_SPEEDS = {"mph": "mile per hour", "kph": "km per hour", "kmh": "km per hour", "mps": "m per s"}
_MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_NEVER = frozenset(
    ["or", "and", "to", "less", "more", "than", "times", "plus", "minus", "over", "by", "is", "not", "negative", "no",
     "x", "y", "z", "e", "i", "pi", "if", "else", "either", "neither", "about", "approximately", "least", "most",
     "between", "except", "greater", "fewer", "under", "above", "below", "up", "down", "mod", "modulo", "factorial",
     "squared", "cubed", "base", "root", "choose", "divided", "multiplied", "power", "remainder", "sin", "cos", "tan",
     "log", "ln", "exp", "sqrt", "infinity", "maybe", "perhaps", "probably", "wrong", "incorrect", "false", "true",
     "but", "third", "thirds", "quarter", "quarters", "fourth", "fourths", "fifth", "fifths", "sixth", "sixths",
     "seventh", "sevenths", "eighth", "eighths", "ninth", "ninths", "tenth", "tenths", "hundredth", "hundredths",
     "thousandth", "thousandths", "half", "halves", "tens", "hundreds", "thousands", "millions", "billions",
     "trillions", "dozens", "alternatively", "versus", "vs", "unless", "actually", "sorry", "instead", "rather",
     "guess", "roughly", "almost", "nearly", "ish", "minimum", "maximum", "too", "doubled", "tripled", "halved",
     "double", "triple", "twice", "thrice", "reciprocal", "inverse", "point", "score", "gross", "lakh", "crore", "bn",
     "mn", "permille", "percent", "percentage", "percentages", "through", "otherwise", "off", "increase", "decrease",
     "increased", "decreased", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
     "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "thirty",
     "forty", "fifty", "sixty", "seventy", "eighty", "ninety", "zero", "only", "without", "nope", "halfs", "thou",
     "grand", "myriad", "milliard", "milliards", "against", "negated", "inverted", "raised", "mille", "ppm",
     "approx", "mil", "bil", "kk", "prozent", "drittel", "viertel", "tercio", "tercios", "tausend", "hundert"]
)
"""What makes another number of the one before it, takes it back or offers a second: no unit."""
_NUMBERS = re.compile(
    r"\w*illi(?:on|ard)(?:s|en)?|mill[oó]n(?:es)?|\w*(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|teenth|tieth|illionth)s?"
    r"|lakhs|crores|scores|googols?|zillions?|myriads|percents|basis|bps|quadrupled|quintupled|mill|rejected|extraneous"
    r"|invalid|impossible|undefined|none|fails|failed|excluded|mistaken|unsure|bounds?|contradiction"
)
"""As `_NEVER`, in families: quadrillions, billionths, twentieths; and what takes an answer back."""
_SHORT_UNITS = frozenset(
    ["bag", "box", "can", "car", "cat", "cup", "dog", "egg", "jar", "men", "pen", "per", "pie", "row", "sq", "toy",
     "way"]
)
_AT_THE_END = frozenset(
    ["binary", "octal", "decimal", "hexadecimal", "hex", "recurring", "repeating", "opposite", "kilo", "mega", "giga"]
)
"""The same where nothing follows: `10 in binary`, but `16 binary strings`."""
_SENSES = frozenset(
    ["north", "south", "east", "west", "ago", "hence", "loss", "profit", "gain", "debt", "before", "after", "early",
     "late", "ahead", "behind", "deposit", "withdrawal", "forward", "backward", "clockwise", "counterclockwise",
     "short"]
)
"""Words that say which way a quantity counts: two different ones are two different answers."""
_WORD_LIMIT = 20
_FILLERS = frozenset(["long", "tall", "wide", "high", "deep", "old", "away", "total", "each", "left", "remaining"])


@dataclass(frozen=True)
class Unit:
    """Dimension as sorted powers, factor to the base unit; for words we do not know, the words themselves."""

    dimension: tuple[tuple[str, int], ...]
    factor: Fraction = Fraction(1)
    sense: str = ""
    """which way it counts: north, ago, loss"""
    money: bool = False
    """said as "pounds", which may be money; lbs are not"""


@dataclass(frozen=True)
class Split:
    """An answer without its unit. `percent` where it was followed by one; `scale` of "5 thousand" is 1000."""

    core: str
    unit: Unit | None = None
    percent: bool = False
    scale: int = 1


_ROMAN_TAIL = re.compile(
    r"((?:\\(?:text|mathrm|textbf|textit|mbox|operatorname|textrm)\s*\{[^{}]{0,80}\}\s*"
    r"(?:\^\s*\{?\s*-?\d\s*\}?\s*)?(?:/\s*)?)+)$"
)
_PLAIN_TAIL = re.compile(r"(?<=[\d\s)}])\s*([A-Za-z][A-Za-z.'\s/-]*(?:\^\s*\{?-?\d\}?[A-Za-z.'\s/-]*)*)$")
"""Both tails can be split in one way only, or a hostile answer would make the match exponential."""
_UNIT_WORDS = re.compile(r"[A-Za-z][A-Za-z.'\s/-]*(?:\^\s*\{?\s*-?\d\s*\}?[A-Za-z.'\s/-]*)*")
_ABBREVIATED = re.compile(r"(?<=[A-Za-z])\.")
_NUMERIC_CORE = re.compile(
    r"(?:[\d.,\s/+*^{}()-]|\\frac(?![A-Za-z])|\\pi(?![A-Za-z])|\\sqrt(?![A-Za-z])|\\times|\\cdot)+"
)
_SIGNS = {"£": "sterling", r"\pounds": "sterling", "€": "euro", "¥": "yen", "₹": "rupee"}
_CURRENCY = re.compile(r"([-+]?)\s*(\\\$|\$|£|\\pounds|€|¥|₹|USD|US\\?\$)\s*(?=[-\d.(\\])")


def split_unit(text: str, *, numeric_only: bool = True) -> Split:
    """Take currency, percent and unit off cleaned text."""
    money, unit = "", None
    currency = _CURRENCY.match(text)
    if currency:
        money = _SIGNS.get(currency.group(2), "dollar")
        text, unit = currency.group(1) + text[currency.end() :], parse_unit(money)
    if text.endswith("%"):
        return Split(text[:-1].rstrip(), unit, percent=True)
    tail = _ROMAN_TAIL.search(text)
    if tail and tail.start() > 0:
        words = re.sub(r"\\[a-z]+\s*\{([^{}]*)\}", r" \1 ", tail.group(1))
        core = text[: tail.start()].rstrip()
        if money and core.endswith("/"):
            core, words = core[:-1], f"per {words}"
        if words.strip() == "%":
            return Split(core, unit, percent=True)
        if not _UNIT_WORDS.fullmatch(words.strip()):
            return Split(text, unit)  # more of the number, or a second one: 1\text{,000}, 5\text{; 6}
    else:
        tail = _PLAIN_TAIL.search(text)
        if not tail or tail.start(1) == 0:
            return Split(text, unit)
        words, core = tail.group(1), text[: tail.start(1)].rstrip()
        temperature = words in ("C", "F") and core.endswith((r"\circ", "circ}"))
        if not temperature and not _reads_as_unit(words, spaced=text[tail.start(1) - 1] == " "):
            return Split(text, unit)
    core = re.sub(r"\^\s*\{?\s*\\circ\s*\}?$", "", core) if re.match(r"\s*[CF]\b", words) else core
    label, _, value = core.rpartition("=")
    if not any(mark.isdigit() for mark in value) or not _NUMERIC_CORE.fullmatch(value) or len(label) > 40:
        return Split(text, unit)
    return _with_words(text, core, " ".join(words.split()), money)


_COMPOUND = re.compile(r"(\d{1,9})\s?([A-Za-z]{1,12})\.?,?\s(?:and\s)?(\d{1,9})\s?([A-Za-z]{1,12})\.?")


def compound(text: str) -> Split | None:
    """`1 hour 30 minutes` as 90 minutes: units of one kind, the larger first, less of the smaller than makes one."""
    bare = " ".join(re.sub(r"\\(?:text|mathrm|textrm|mbox)\s?\{([^{}]{0,40})\}", r" \1 ", text).split())
    if (match := _COMPOUND.fullmatch(bare)) is None:
        return None
    many, large, few, small = match.groups()
    one, two = parse_unit(large), parse_unit(small)
    if one.dimension != two.dimension or _base(large) is None or _base(small) is None:
        return None
    worth = one.factor / two.factor
    return Split(str(int(many) * worth + int(few)), two) if worth > max(int(few), 1) else None


def _reads_as_unit(words: str, *, spaced: bool) -> bool:
    """Whether bare letters after a number are a unit rather than variables: `5 cm`, `5 apples`, not `5ab`, `5R^2`."""
    first = words.replace("^", " ").replace("/", " ").split()[0].rstrip(".")
    if _base(first) is not None or first.casefold() in _SPEEDS:
        return spaced or (len(first) > 1 and first not in ("mg", "ms"))  # m times g, m times s
    hour = words.casefold() in ("a.m", "a.m.", "p.m", "p.m.")
    return spaced and (len(first) >= 4 or first in _SHORT_UNITS or hour)


def _with_words(text: str, core: str, words: str, money: str) -> Split:
    words = _ABBREVIATED.sub("", words)
    folded = words.casefold().strip(" .")
    unit = parse_unit(money) if money else None
    if folded in ("percent", "per cent", "percentage", "percentage points", "pct"):
        return Split(core, None, percent=True)
    parts = re.findall(r"[a-z]+", folded)
    if parts[:1] in (["percent"], ["percentage"], ["pct"]):
        return Split(text, unit) if _NEVER & set(parts[1:]) else Split(core, None, percent=True)
    scale = 1
    while parts and parts[0] in _MULTIPLIERS:
        scale *= _MULTIPLIERS[parts.pop(0)]
        folded = folded.split(None, 1)[1] if " " in folded else ""
        words = words.split(None, 1)[1] if " " in words else ""
    while len(parts) > 1 and parts[-1] in _FILLERS:
        parts.pop()
        words = words.rsplit(None, 1)[0]
    if parts == ["times"]:
        return Split(core, parse_unit("times"))  # how often
    if any(part in _NEVER and (not place or part not in ("squared", "cubed")) for place, part in enumerate(parts)):
        return Split(text, unit)
    if any(_NUMBERS.fullmatch(part) for part in parts if part not in _MULTIPLIERS):
        return Split(text, unit)
    if parts and (parts[-1] in _AT_THE_END or set(parts) & (_MULTIPLIERS.keys() - {"dozen"})):
        return Split(text, unit)  # 5 per thousand, 5 per dozen being a rate
    if len(parts) > 8 or any(_no_word(word) for word in re.findall(r"[A-Za-z]+", words)):
        return Split(text, unit)
    if not parts:
        return Split(core, unit, scale=scale)
    said = parse_unit(words)
    if money:
        per = re.match(r"(?:per\b|an?\b|/)", words)
        said = parse_unit(f"{money} {words}") if per else Unit(parse_unit(money).dimension, sense=said.sense)
    return Split(core, said, scale=scale)


def _no_word(word: str) -> bool:
    """A letter that is no unit, an adverb, a multiple, or no word at all."""
    lone = len(word) == 1 and word not in "CFa" and _base(word) is None
    return lone or len(word) > _WORD_LIMIT or (len(word) > 4 and word.casefold().endswith(("ly", "fold")))


def _base(word: str) -> tuple[str, Fraction] | None:
    if word[:1] == "M" and len(word) <= 2:
        return None  # mega, which is not milli: 5 Mm, 5 M
    for form in (word, word.casefold(), word.casefold().removesuffix("s"), word.casefold().removesuffix("es")):
        if form in _BASE and (form in _CASED or form == form.casefold()):
            return _BASE[form]
    return None


def parse_unit(words: str) -> Unit:
    """`cm^2`, `square feet`, `meters per second`, `m/s^2`, or unknown words taken as they are."""
    words = _SPEEDS.get(words.casefold(), words.lower() if words.casefold() in ("am", "pm") else words)
    words = re.sub(r"(?i)\bdeg(?:ree)?s? (?=(?:celsius|fahrenheit|c|f)\b)", "", words)
    senses = [word for word in re.findall(r"[a-z]+", words.casefold()) if word in _SENSES]
    if senses:
        rest = " ".join(word for word in words.split() if word.casefold().strip(".") not in _SENSES)
        return replace(parse_unit(rest), sense=" ".join(senses)) if rest else Unit((), sense=" ".join(senses))
    text = re.sub(r"\bper\b|\ba\b(?=\s)", "/", words).replace("{", "").replace("}", "").replace("^", "^")
    top, *bottoms = text.split("/")
    powers: dict[str, int] = {}
    factor = Fraction(1)
    for sign, part in [(1, top), *((-1, bottom) for bottom in bottoms)]:
        prefix = 1
        pending: str | None = None
        for token in re.findall(r"[A-Za-z]+|\^\s*-?\d|-?\d", part):
            name = token.casefold()
            if name in ("square", "sq", "cubic", "cu"):
                prefix = 2 if name.startswith("s") else 3
                continue
            if name in ("squared", "cubed") or token[0] in "^-0123456789":
                power = {"squared": 2, "cubed": 3}.get(name) or int(token.lstrip("^ "))
                if pending is None:
                    return _unknown(words)
                dimension, size = _base(pending)  # type: ignore[misc]
                powers[dimension] += sign * (power - 1)
                factor *= size ** (sign * (power - 1))
                continue
            known = _base(token)
            if name in ("c", "f") and token.isupper():
                known = ("temperature" if name == "c" else "temperature_f", Fraction(1))
            if known is None:
                return _unknown(words)
            powers[known[0]] = powers.get(known[0], 0) + sign * prefix
            factor *= known[1] ** (sign * prefix)
            pending, prefix = token, 1
    if "volume" in powers:  # a litre is a cubic decimetre
        count = powers.pop("volume")
        powers["length"] = powers.get("length", 0) + 3 * count
        factor *= Fraction(1, 1000) ** count
    dimension = tuple(sorted((name, power) for name, power in powers.items() if power))
    return Unit(dimension, factor, money=words.casefold() in ("pound", "pounds"))


def _unknown(words: str) -> Unit:
    """By its first word, and by all that stands behind "per"."""
    head, slash, rate = re.sub(r"\bper\b", "/", words.casefold()).partition("/")
    parts = re.findall(r"[a-z]+", words if len(words) <= 2 else head, re.IGNORECASE)  # GB is not Gb
    name = (parts[0].removesuffix("s") if parts else "") + slash + " ".join(re.findall(r"[a-z]+", rate))
    return Unit((("word:" + name, 1),))


def conversion(gold: Unit | None, answer: Unit | None) -> Fraction | None:
    """By what the answer must be multiplied to be in the gold's unit; None where the units cannot be the same thing."""
    if gold is None or answer is None:
        return Fraction(1)
    if any(one == parse_unit("sterling") and two.money for one, two in ((gold, answer), (answer, gold))):
        return Fraction(1)  # £5 is 5 pounds
    if gold.dimension != answer.dimension or (gold.sense and answer.sense and gold.sense != answer.sense):
        return None
    return answer.factor / gold.factor


_HOW_MANY = re.compile(
    r"\b(?P<how>how many|in) (?P<unit>(?:square |cubic )?[a-z]+(?:\^\{?[23]\}?)?"
    r"(?:(?: per |\s?/\s?)[a-z]+(?:\^\{?[23]\}?)?)?)",
    re.IGNORECASE,
)


def asked_unit(prompt: str) -> Unit | None:
    """The unit of the one quantity that the question asks "how many" of, or to be answered "in"; None where it asks for
    several or for none."""
    asked = {
        each["unit"].casefold()
        for each in _HOW_MANY.finditer(prompt)
        if each["how"].casefold() != "in" or measured(parse_unit(each["unit"]))
    }
    return parse_unit(asked.pop()) if len(asked) == 1 else None


def measured(unit: Unit) -> bool:
    """Whether it is a unit that we know, and no word."""
    return bool(unit.dimension) and not any(name.startswith("word:") for name, _ in unit.dimension)


def not_asked(asked: Unit | None, said: Unit | None) -> bool:
    """Minutes where hours were asked for; or euros, or miles."""
    factor = conversion(asked, said)
    if factor is None:
        return asked is not None and said is not None and measured(asked) and measured(said)
    return factor != 1


_QUANTITIES = (
    (re.compile(r"\bhow far\b|\bdistance\b|\bperimeter\b|\bcircumference\b|\bradius\b|\bdiameter\b"), "m"),
    (re.compile(r"\barea\b"), "m^2"),
    (re.compile(r"\bvolume\b"), "m^3"),
    (re.compile(r"\bspeed\b|\bvelocity\b|\bhow fast\b"), "m/s"),
)
_HOW_LONG = re.compile(r"\bhow (?:long|much time|tall|high|deep|wide)\b")
_OTHERWISE = re.compile(r"\btime\b|\bhow (?:long|many|much|old|often)\b|\bwhen\b|\bcosts?\b|\bprices?\b")
"""A question that speaks of a distance and asks for something else."""
_GIVEN = re.compile(r"\d\s?([A-Za-z]{1,12}(?:\s?/\s?[A-Za-z]{1,8}|\sper\s[a-z]{1,8})?(?:\^\{?\d\}?)?)")


def foreign(prompt: str, said: Unit) -> bool:
    """Whether a known unit is none that the question can want: hours for a distance, or miles where all is in km."""
    if not measured(said):
        return False
    question = next((part for part in reversed(re.split(r"[.?!]\s|\?", prompt.casefold())) if part.strip()), "")
    asked = [parse_unit(unit).dimension for words, unit in _QUANTITIES if words.search(question)]
    units_of_length = tuple(("length" if name == "unit" else name, power) for name, power in said.dimension)
    if len(asked) == 1 and asked[0] != units_of_length and not _OTHERWISE.search(question):
        return True
    units = [parse_unit(piece) for found in _GIVEN.finditer(prompt) for piece in re.split(r"/|\bper\b", found[1])]
    units += [parse_unit(found[1]) for found in _GIVEN.finditer(prompt)]
    given = {unit.factor for unit in units if unit.dimension == said.dimension}
    bases = [base for word in re.findall(r"[A-Za-z]+", prompt) if (base := _base(word)) is not None]
    named = {factor for name, factor in bases if said.dimension == ((name, 1),)}
    return bool((asked or _HOW_LONG.search(question)) and given) and said.factor not in given | named
