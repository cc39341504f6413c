"""Checking a claimed root, derivative or antiderivative by putting it back in; runs inside a killable worker."""

from __future__ import annotations

from typing import Any

import sympy
from sympy import Expr

from cabochon.verifiers.math_equal import unlabel
from cabochon.verifiers.math_extract import Extraction, extract
from cabochon.verifiers.math_judge import read
from cabochon.verifiers.math_lex import MathSyntaxError
from cabochon.verifiers.math_numbers import same_formula
from cabochon.verifiers.math_parse import parse
from cabochon.verifiers.math_values import Chain, Items, Leaf, Value, is_opaque


def judge(text: str, kind: str, given: str, variable: str, count: int | None, rules: dict[str, Any]) -> dict[str, Any]:
    """The verdict on a completion as plain data; `unusable` where the task is not one."""
    try:
        name = _formula(parse(variable))
        subject = parse(given)
    except MathSyntaxError as error:
        return {"unusable": f"cannot read {given[:60]!r} in {variable!r}: {error}"}
    if name is None or not name.is_Symbol:
        return {"unusable": f"the variable must be a letter, got {variable!r}"}
    found = extract(text, Extraction(**(rules | {"methods": tuple(rules["methods"])})))
    evidence: dict[str, Any] = {"given": given, "kind": kind}
    if found is None or not (found.answer or found.problem):
        return _verdict("no_answer", "no answer found", evidence)
    evidence["answer"] = found.answer[:500]
    if found.problem:
        return _verdict("malformed", found.problem, evidence)
    reading = read(found.answer)
    if reading.value is None:
        return _verdict("malformed", f"the answer cannot be read: {reading.problem}", evidence)
    try:
        right, detail = _check(kind, subject, name, reading.value, count)
    except MemoryError:
        raise
    except _Unusable as error:
        return {"unusable": str(error)}
    except Exception as error:  # sympy on what the model wrote; the subject itself was read before
        return _verdict("malformed", f"cannot be checked: {type(error).__name__}", evidence)
    return _verdict("ok" if right else "wrong", detail, evidence)


class _Unusable(ValueError):
    pass


def _check(kind: str, subject: Value, variable: sympy.Symbol, answer: Value, count: int | None) -> tuple[bool, str]:
    match kind:
        case "root":
            return _roots(_residual(subject), variable, answer, count)
        case "derivative" | "integral":
            inner = _formula(subject)
            claimed = _formula(unlabel(answer)[1])
            if inner is None:
                raise _Unusable(f"the task must give a formula to take the {kind} of")
            if claimed is None:
                return False, "not a formula"
            real = sympy.Symbol(variable.name, real=True)
            inner, claimed = inner.subs(variable, real), claimed.subs(variable, real)
            if kind == "derivative":
                return _agree(sympy.diff(inner, real), claimed, "the derivative of what was given")
            return _agree(inner, sympy.diff(claimed, real), "its derivative is what was given")
    raise _Unusable(f"kind must be root, derivative or integral, got {kind!r}")


def _agree(one: Expr, two: Expr, what: str) -> tuple[bool, str]:
    right = not is_opaque(one) and not is_opaque(two) and same_formula(one.doit(), two.doit())
    return right, what if right else f"not {what}"


def _residual(subject: Value) -> Expr:
    """What must vanish at a root: of an equation its difference, of a formula itself."""
    if isinstance(subject, Chain) and subject.relations == ("=",):
        left, right = _formula(subject.items[0]), _formula(subject.items[1])
        if left is not None and right is not None:
            return left - right
    formula = _formula(subject)
    if formula is None:
        raise _Unusable("the task must give an equation or a formula")
    return formula


def _roots(residual: Expr, variable: sympy.Symbol, answer: Value, count: int | None) -> tuple[bool, str]:
    """Every claimed root must be one; `count` distinct ones where the task says how many."""
    if variable not in residual.free_symbols:
        raise _Unusable(f"the equation does not contain {variable}")
    label, bare = unlabel(answer)
    if label is not None and label != variable:
        return False, f"names {label}, not {variable}"
    items = bare.items if isinstance(bare, Items) and bare.kind in ("list", "set") else (bare,)
    roots: list[Expr] = []
    for item in items:
        root = _formula(item)
        if root is None or variable in root.free_symbols or not root.is_finite or is_opaque(root):
            return False, "not a number"
        if not same_formula(residual.subs(variable, root), sympy.Integer(0)):
            return False, f"{root} is not a root"[:200]
        if not any(same_formula(root, other) for other in roots):
            roots.append(root)
    if count is not None and len(roots) != count:
        return False, f"{len(roots)} of {count} roots"
    return True, "satisfies the equation"


def _formula(value: Value) -> Expr | None:
    return value.expr if isinstance(value, Leaf) else None


def _verdict(status: str, detail: str, evidence: dict[str, Any]) -> dict[str, Any]:
    return {"score": float(status == "ok"), "status": status, "detail": detail[:300], "evidence": evidence}
