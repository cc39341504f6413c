"""The code verifier on real sandboxes: each kind of test, each status, evidence, and MBPP with mutants."""

# ruff: noqa: E501 (programs are data, one a line)

import ast
import concurrent.futures
import json
import os
import pathlib
import random
import subprocess
import sys

import pytest
from boxes import ISOLATED, opened

from cabochon.protocols import Verifier
from cabochon.types import Task
from cabochon.verifiers.code import CodeVerifier, same_output
from cabochon.verifiers.sandbox.base import Limits, SandboxError
from cabochon.verifiers.sandbox.docker import DockerSandbox
from cabochon.verifiers.sandbox.process import ProcessSandbox

HERE = pathlib.Path(__file__).parent
LIMITS = Limits(wall_seconds=30.0, cpu_seconds=30.0)


@pytest.fixture(scope="module", params=ISOLATED)
def both(request):
    with opened(request.param, warm=4) as box:
        yield CodeVerifier(box, limits=LIMITS)


@pytest.fixture(scope="module")
def verifier():
    with opened("bubblewrap", warm=4) as box:
        yield CodeVerifier(box, limits=LIMITS)


def task(**payload):
    return Task(id="t", prompt="", verifier="code", payload=payload)


def fenced(source):
    return f"```python\n{source}\n```"


F = task(tests=["assert f(2) == 4", "assert f(3) == 9", "assert f(-1) == 1"])


def test_is_a_verifier(verifier):
    assert isinstance(verifier, Verifier)


@pytest.mark.parametrize(
    ("source", "status", "passed"),
    [
        ("def f(x): return x * x", "ok", 3),
        ("def f(x): return x + x", "wrong", 1),
        ("def f(x):\n    while x > 2: pass\n    return x * x", "timeout", 1),
        ("import os\ndef f(x): return x * x if x < 3 else os._exit(0)", "crash", 1),
        ("def f(x): return bytearray(1 << 33) and 4", "oom", 0),
        ("def f(x) return", "malformed", 0),
        ("raise ValueError('no')", "crash", 0),
        ("def f(x):\n    a = []; a.append(a); return a", "malformed", 0),
    ],
)
def test_statuses(both, source, status, passed):
    quick = CodeVerifier(
        both.sandbox, limits=Limits(wall_seconds=4.0 if status == "timeout" else 30.0), score="fraction"
    )
    verdict = quick.verify(F, fenced(source))
    assert verdict.status == status, verdict
    assert verdict.evidence["passed"] == passed
    assert verdict.score == pytest.approx(passed / 3)


def test_evidence_names_the_first_failure(verifier):
    verdict = verifier.verify(
        F, fenced("import sys\ndef f(x):\n    print('trace', x, file=sys.stderr)\n    return [x, 1]")
    )
    assert verdict.score == 0.0
    assert verdict.evidence["first_failure"] == {
        "test": "assert f(2) == 4", "call": "f(2)", "error": "AssertionError: assert f(2) == 4", "got": "[2, 1]", "expected": "4",
    }  # fmt: skip
    assert "trace 2" in verdict.evidence["stderr"]
    assert verdict.evidence["program"].startswith("import sys")
    raised = verifier.verify(F, fenced("def f(x): return {}[x]"))
    assert raised.evidence["first_failure"]["error"] == "KeyError: 2"
    missing = verifier.verify(F, fenced("def g(x): return x"))
    assert "does not define f" in missing.detail


@pytest.mark.parametrize(
    "text", ["", "I do not know.", "\x00", "\ud800" * 10, "[" * 10_000, "```python\n" + "(" * 50_000, "x" * 10_000_000]
)
def test_any_text_is_judged(verifier, text):
    verdict = verifier.verify(F, text)
    assert verdict.score == 0.0
    assert verdict.status in ("no_answer", "malformed", "crash", "wrong")


HUMANEVAL = task(
    prompt='from typing import List\nimport math\n\ndef poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n\n'
    'def find_zero(xs: List[float]) -> float:\n    """A zero of the line xs[0] + xs[1] x."""\n',
    entry_point="find_zero",
    test="METADATA = {}\n\ndef check(candidate):\n    import random\n    rng = random.Random(1)\n    for _ in range(5):\n"
    "        xs = [rng.randint(1, 9), rng.randint(1, 9)]\n        assert math.fabs(poly(xs, candidate(list(xs)))) < 1e-4\n"
    "    assert candidate([0, 1]) == 0\n    assert round(candidate([1, 2]), 1) == -0.5\n",
)  # fmt: skip


def test_humaneval_form(both):
    for text in ("    return -xs[0] / xs[1]\n", fenced("def find_zero(xs):\n    return -xs[0] / xs[1]"),
                 HUMANEVAL.payload["prompt"] + "    return -xs[0] / xs[1]\n"):  # fmt: skip
        verdict = both.verify(HUMANEVAL, text)
        assert (verdict.status, verdict.score) == ("ok", 1.0), verdict
    forged = "def poly(xs, x):\n    return 0.0\ndef find_zero(xs):\n    return 0.0"
    assert both.verify(HUMANEVAL, fenced(forged)).score == 0.0


@pytest.mark.parametrize("use", ["print(f(2))", "def test_f():\n    assert f(2) == 4", "from solution import f\nprint(f(1))"])
def test_an_example_of_use_after_the_program_is_not_the_program(verifier, use):
    told = f"{fenced('def f(x):' + chr(10) + '    return x * x')}\nUsage:\n{fenced(use)}"
    humaneval = task(prompt='def f(x):\n    """Square."""\n', entry_point="f",
                     test="def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(2) == 4")  # fmt: skip
    for some in (F, humaneval):
        assert verifier.verify(some, told).status == "ok"
        assert verifier.verify(some, told.replace("x * x", "x + x")).status == "wrong"
    method = task(entry_point="S.f", calls=[{"args": [3], "expected": 9}])
    told = f"{fenced('class S:' + chr(10) + '    def f(self, x): return x * x')}\n{fenced('print(S().f(2))')}"
    assert verifier.verify(method, told).status == "ok"


def test_a_body_in_a_fence_and_the_helpers_of_the_prompt(verifier):
    programs = ("    return -xs[0] / xs[1]", "    a, b = xs\n    return -a / b",
                "def find_zero(xs: List[float]) -> float:\n    return -xs[0] / xs[1] + 0 * math.floor(poly(xs, 0))",
                "from __future__ import annotations\ndef find_zero(xs: Gone) -> List:\n    return -xs[0] / xs[1] + 0 * poly(xs, 0)")  # fmt: skip
    for source in programs:
        verdict = verifier.verify(HUMANEVAL, fenced(source))
        assert verdict.status == "ok", verdict


def test_output_may_be_as_long_as_what_is_expected(verifier):
    want = "\n".join(str(10**9 + i) for i in range(150_000))
    rows = task(cases=[{"stdin": "", "stdout": want}])
    assert verifier.verify(rows, fenced("for i in range(150_000): print(10**9 + i)")).status == "ok"
    assert verifier.verify(rows, fenced("while True: print('x' * 1000)")).status == "crash"


def test_stdio_form(both):
    rows = task(cases=[{"stdin": "3\n1 2 3\n", "stdout": "6\n0.5"}, {"stdin": "1\n5\n", "stdout": "5\n0.50"}])
    good = "n = int(input())\nprint(sum(map(int, input().split())), ' ')\nprint('0.500')"
    assert both.verify(rows, fenced(good)).status == "ok"
    verdict = both.verify(rows, fenced("input()\nprint(6)\nprint(0.5)"))
    assert (verdict.status, verdict.evidence["fraction"]) == ("wrong", 0.5)
    assert verdict.evidence["first_failure"] == {
        "test": "case 2",
        "input": "1\n5\n",
        "expected": "5\n0.50",
        "got": "6\n0.5\n",
    }
    assert both.verify(rows, fenced("print(")).status == "malformed"
    assert both.verify(rows, fenced("1/0")).status == "crash"


def test_calls_form(both):
    calls = [{"args": [[3, 1]], "expected": [1, 3]}, {"args": [[]], "expected": []}]
    rows = task(calls=calls, entry_point="Solution.order")
    assert both.verify(rows, fenced("class Solution:\n    def order(self, xs): return sorted(xs)")).status == "ok"
    assert both.verify(rows, fenced("class Solution:\n    def order(self, xs): return xs")).evidence["passed"] == 1


PYTEST_FILE = """
import pytest
from solution import Account, parse

@pytest.fixture
def account():
    return Account(10)

def test_balance(account):
    account.deposit(5)
    assert account.balance == 15

@pytest.mark.parametrize("text, want", [("1", 1), ("-2", -2)])
def test_parse(text, want):
    assert parse(text) == want

def test_errors(account):
    with pytest.raises(ValueError, match="too much"):
        account.withdraw(100)

class TestFloats:
    def test_half(self):
        assert Account(1).balance / 2 == pytest.approx(0.5)

@pytest.mark.skip(reason="not now")
def test_skipped():
    assert False
"""
ACCOUNT = (
    "class Account:\n    def __init__(self, b): self.balance = b\n    def deposit(self, n): self.balance += n\n"
    "    def withdraw(self, n):\n        if n > self.balance: raise ValueError('too much')\n        self.balance -= n\n"
    "parse = int"
)


def test_pytest_file(both):
    rows = task(tests=PYTEST_FILE)
    verdict = both.verify(rows, fenced(ACCOUNT))
    assert (verdict.status, verdict.evidence["passed"], verdict.evidence["total"]) == ("ok", 5, 5), verdict
    verdict = both.verify(rows, fenced(ACCOUNT.replace("too much", "no").replace("+=", "-=")))
    assert (verdict.status, verdict.evidence["passed"], verdict.evidence["total"]) == ("wrong", 3, 5)
    assert verdict.evidence["first_failure"]["test"] == "test_balance"
    assert verdict.evidence["first_failure"]["got"] == "5"


def test_unittest_file(both):
    source = (
        "import unittest\nimport solution\nclass T(unittest.TestCase):\n    def setUp(self): self.x = 3\n"
        "    def test_a(self): self.assertEqual(solution.f(self.x), 9)\n"
        "    def test_b(self):\n        for i in range(3):\n            with self.subTest(i=i): self.assertEqual(solution.f(i), i * i)\n"
        "    def test_c(self):\n        with self.assertRaises(TypeError): solution.f('x')\n"
        "if __name__ == '__main__':\n    unittest.main()"
    )
    assert both.verify(task(tests=source), fenced("def f(x): return x * x")).evidence["total"] == 3
    verdict = both.verify(task(tests=source), fenced("def f(x): return x * x if x != 1 else 7"))
    assert (verdict.status, verdict.evidence["passed"]) == ("wrong", 2)


@pytest.mark.parametrize(
    ("tests", "source"),
    [
        (["assert f(lambda x: x + 1, [1, 2]) == [2, 3]"], "def f(g, xs): return list(map(g, xs))"),
        (["assert f(2)(3) == 6", "assert f(int)('4') == 4"], "def f(n): return n if n is int else (lambda x: n * x)"),
        (["assert list(f(3)) == [0, 1, 2]", "g = f(10)\nassert next(g) == 0 and next(g) == 1"], "def f(n): yield from range(n)"),
        (["assert 3 in f()\nassert 99 not in f()"], "def f(): return {1: 2, 3: 4}.keys()"),
        (["import asyncio\nassert asyncio.run(f(2)) == 4"], "async def f(x): return x * x"),
        (["assert f() == {(1, 2): frozenset({3}), None: b'x', 1.5: 2 + 1j}"], "def f(): return {(1, 2): frozenset({3}), None: b'x', 1.5: 2 + 1j}"),
        (["from collections import Counter\nassert f('aab') == Counter('aab')\nassert f('aab').most_common(1) == [('a', 2)]"],
         "from collections import Counter\nf = Counter"),
        (["try:\n    f()\n    assert False\nexcept Broken as e:\n    assert str(e) == 'why'\nexcept Exception:\n    assert False"],
         "class Broken(LookupError): pass\ndef f(): raise Broken('why')"),
        (["d = {1: [2]}\nassert f(d) is None\nassert d == {1: [2, 3], 2: 0}"], "def f(d): d[1].append(3); d[2] = 0"),
        (["n = Node(1)\nn.next = Node(2)\nassert f(n) == 3\nassert n.next.value == 2 and n.next.next is None"],
         "class Node:\n    def __init__(self, v): self.value = v; self.next = None\ndef f(n):\n    s = 0\n    while n: s += n.value; n = n.next\n    return s"),
        (["with Guard() as g:\n    assert g.inside is True\nassert g.inside is False"],
         "class Guard:\n    inside = False\n    def __enter__(self): self.inside = True; return self\n    def __exit__(self, *a): self.inside = False"),
        (["v = Vec(1, 2) + Vec(3, 4)\nassert (v.x, v.y) == (4, 6)\nassert v == Vec(4, 6) and v != Vec(0, 0)\nassert repr(v) == 'Vec(x=4, y=6)'"],
         "from dataclasses import dataclass\n@dataclass\nclass Vec:\n    x: int\n    y: int\n    def __add__(self, o): return Vec(self.x + o.x, self.y + o.y)"),
        (["v = Vec(2) * 3\nassert v.x == 6 and (3 * Vec(1)).x == 3\nassert Vec(1) < Vec(2) and abs(Vec(-4)) == 4 and Vec(2) @ Vec(5) == 10"],
         "class Vec:\n    def __init__(self, x): self.x = x\n    def __mul__(self, n): return Vec(self.x * n)\n    __rmul__ = __mul__\n"
         "    def __lt__(self, o): return self.x < o.x\n    def __abs__(self): return abs(self.x)\n    def __matmul__(self, o): return self.x * o.x"),
        (["assert LIMIT == 5 and f(LIMIT) == 5"], "LIMIT = 5\ndef f(x): return x"),
    ],
)  # fmt: skip
def test_what_may_pass_between(verifier, tests, source):
    verdict = verifier.verify(task(tests=tests), fenced(source))
    assert verdict.status == "ok", verdict


def test_changes_to_arguments_need_a_function_that_returns_none(verifier):
    tests = ["xs = [2, 1]\nk = f(xs)\nassert (k, xs) == (2, [1, 2])"]
    source = fenced("def f(xs): xs.sort(); return len(xs)")
    assert verifier.verify(task(tests=tests), source).status == "wrong"
    assert verifier.verify(task(tests=tests, mutates=True), source).status == "ok"


def test_unusable_task_is_the_callers_error(verifier):
    with pytest.raises(ValueError, match="tests do not parse"):
        verifier.verify(task(tests=["assert ("]), "x = 1")


def test_a_broken_machine_is_an_infra_error(monkeypatch):
    box = ProcessSandbox()

    def broken(limits=None):
        raise SandboxError("engine gone")

    monkeypatch.setattr(box, "open", broken)
    verdict = CodeVerifier(box).verify(F, fenced("def f(x): return x"))
    assert (verdict.score, verdict.status) == (None, "infra_error")
    assert "engine gone" in verdict.detail


def test_broken_tests_are_not_the_models_fault(verifier):
    """The tests' process dies before the program was asked anything."""
    verdict = verifier.verify(task(tests=["import os\nos._exit(1)\nassert f(1) == 1"]), fenced("def f(x): return x"))
    assert verdict.status == "infra_error"


@pytest.mark.parametrize(
    ("got", "want", "equal"),
    [("1\n2", "1\n2\n\n", True), ("1  \r\n2", "1\n2", True), ("1 2", "1\n2", True), ("0.3333333", "0.33333333", True),
     ("1", "1.0", True), ("1.0", "1", False), ("1.001", "1.0", False), ("12", "1 2", False), ("", "0", False), ("YES", "Yes", False),
     ("nan", "1.0", False), ("1" * 10**6, "1", False), ("123456.85", "123456.78", False), ("123456.7812", "123456.78", True),
     ("1000000", "1000000.5", False), ("1000000.5000001", "1000000.5", True), ("12345678901.123458", "12345678901.123456", True),
     ("150000000.01", "1.5e8", True), ("5", "1.0e400", False), ("1.0e400", "1.0e400", True),
     ("0", "0.000000731", False), ("7.311e-7", "0.000000731", True), ("0.0000001", "0.0", True), ("a\u00a0b", "a b", False),
     ("a\u2028b", "a\nb", False), ("a\tb", "a b", True)],
)  # fmt: skip
def test_same_output(got, want, equal):
    assert same_output(got, want) is equal


# -------------------------------------------------------------------------------------------------------------- MBPP


MBPP = Limits(wall_seconds=90.0, cpu_seconds=20.0)
"""the slowest solution takes 8 s (task 123); an operator whose swap makes a loop endless costs all of it, three times"""


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
         ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn}  # fmt: skip


def mutants(code, names, rng):
    """Programs that differ in one place, then some that are surely wrong: another value, no value, a NaN."""
    tree = ast.parse(code)
    spots = [n for n in ast.walk(tree) if (isinstance(n, ast.BinOp | ast.BoolOp) and type(n.op) in SWAPS)
             or (isinstance(n, ast.Compare) and type(n.ops[0]) in SWAPS)]  # fmt: skip
    for spot in rng.sample(spots, min(1, len(spots))):
        holder = spot.ops if isinstance(spot, ast.Compare) else None
        old = holder[0] if holder else spot.op
        new = SWAPS[type(old)]()
        if holder:
            holder[0] = new
        else:
            spot.op = new
        yield "swap", ast.unparse(tree)
        if holder:
            holder[0] = old
        else:
            spot.op = old
    for name in names:
        yield "none", f"{code}\ndef {name}(*a, **k): return None\n"
        yield "equal", f"{code}\nclass _E:\n    def __eq__(s, o): return True\ndef {name}(*a, **k): return _E()\n"
        yield "wrapped", f"{code}\n_real = {name}\ndef {name}(*a, **k): return [_real(*a, **k)]\n"


def mbpp_jobs(table, seed):
    rng = random.Random(seed)
    for row in table:
        from cabochon.verifiers.code_tests import plan_of

        payload = {k: row[k] for k in ("test_list", "test_setup_code")}
        wanted = [n for n in plan_of(payload).wanted if not n[0].isupper() or f"def {n}" in row["code"]][:1]
        one = Task(id=str(row["task_id"]), prompt=row["text"], verifier="code", payload=payload)
        yield one, "canonical", row["code"]
        for kind, source in mutants(row["code"].replace("\r\n", "\n"), wanted, rng):
            yield one, kind, source


def passes_plainly(one, source):
    """Whether a bare interpreter, without any of ours, runs the program and its asserts to the end."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_CPU, ({MBPP.cpu_seconds:.0f},) * 2)"
    lines = [limited, source, one.payload["test_setup_code"], *one.payload["test_list"], "print('the end', flush=True)"]
    command = [sys.executable, "-I", "-c", "\n".join(lines).replace("\r\n", "\n")]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=300)
    return done.returncode == 0 and done.stdout.endswith(b"the end\n")  # exit() before the asserts is no pass


@pytest.mark.parametrize("leave", ["exit()", "quit(0)", "sys.exit()", "raise SystemExit"])
def test_a_program_may_leave_as_in_any_interpreter(both, leave):
    source = f"import sys\nn = int(input())\nif n == 0:\n    print(0)\n    {leave}\nprint(n + 1)"
    cases = [{"stdin": "0\n", "stdout": "0\n"}, {"stdin": "1\n", "stdout": "2\n"}]
    task = Task(id="t", prompt="", verifier="code", payload={"cases": cases})
    assert both.verify(task, fenced(source)).status == "ok"
    assert both.verify(task, fenced(source.replace("n + 1", "n"))).status == "wrong"
    asked = Task(id="t", prompt="", verifier="code", payload={"tests": ["assert f(1) == 2"]})
    function = f"import sys\ndef f(x):\n    if x > 1:\n        {leave}\n    return x + 1"
    assert both.verify(asked, fenced(function)).status == "ok"
    assert both.verify(asked, fenced(function.replace("> 1", "> 0"))).score == 0.0


def check_mbpp(verifier, table, threads):
    """Canonical solutions pass, sure mutants fail, and a swapped operator is judged as a bare interpreter judges it:
    a few swaps are no error that the row's three asserts would notice."""
    jobs = list(mbpp_jobs(table, 7))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        verdicts = list(pool.map(lambda job: verifier.verify(job[0], fenced(job[2])), jobs))
        swaps = {job[0].id: pool.submit(passes_plainly, job[0], job[2]) for job in jobs if job[1] == "swap"}
    killed = {}
    for (one, kind, source), verdict in zip(jobs, verdicts, strict=True):
        assert verdict.status != "infra_error", (one.id, kind, verdict)
        if kind == "canonical":
            assert verdict.score == 1.0, (one.id, verdict)
        else:
            right = kind == "swap" and swaps[one.id].result()
            assert verdict.score == float(right), (one.id, kind, source, verdict)
        if kind != "canonical":
            killed[one.id] = killed.get(one.id, 0) + (verdict.score == 0.0)
    assert min(killed.values()) >= 3
    return [(job[0].id, job[1], verdict.score) for job, verdict in zip(jobs, verdicts, strict=True)]


def test_mbpp_slice(both):
    """All rows on bubblewrap; on docker, ten times slower to fill, the last few, with own classes among them."""
    table = rows(HERE / "data" / "mbpp_slice.jsonl")
    check_mbpp(both, table[-4:] if isinstance(both.sandbox, DockerSandbox) else table, 2)


@pytest.mark.slow
@pytest.mark.bubblewrap
@pytest.mark.docker
@pytest.mark.timeout(4 * 3600)
def test_mbpp_whole_on_both_sandboxes():
    folder = pathlib.Path(os.environ.get("CABOCHON_DATA", HERE.parents[2] / "shared" / "data"))
    table = rows(folder / "mbpp.jsonl")
    with opened("bubblewrap", warm=4) as box:
        first = check_mbpp(CodeVerifier(box, limits=MBPP), table, 3)
    with opened("docker", warm=4) as box:
        assert check_mbpp(CodeVerifier(box, limits=MBPP), table, 4) == first
