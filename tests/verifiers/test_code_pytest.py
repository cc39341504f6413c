"""Pytest files: what is run, that wrong programs are not paid for tests that were not, and which files are refused."""

# ruff: noqa: E501 (programs are data, one a line)

import ast

import pytest
from boxes import opened

from cabochon.types import Task
from cabochon.verifiers.code import CodeVerifier
from cabochon.verifiers.code_pytest import count_tests, unsupported
from cabochon.verifiers.code_tests import plan_of
from cabochon.verifiers.sandbox.base import Limits


@pytest.fixture(scope="module")
def verifier():
    with opened("bubblewrap") as box:
        yield CodeVerifier(box, limits=Limits(wall_seconds=30.0))


HEAD = "import pytest\nfrom solution import f\n"
RIGHT, WRONG = "def f(x): return x * x", "def f(x): return -1"
RUN = {
    "an inherited test": "class Base:\n    def test_f(self): assert f(2) == 4\nclass TestA(Base):\n    def test_g(self): assert f(2) != 5\n",
    "an inherited fixture": "class Base:\n    @pytest.fixture\n    def x(self): return 2\nclass TestA(Base):\n    def test_g(self, x): assert f(x) == 4\n",
    "class-level rows": "@pytest.mark.parametrize('x', [1, 2])\nclass TestA:\n    @pytest.mark.parametrize('y', [0, 1])\n    def test_g(self, x, y): assert f(x + y) == (x + y) ** 2\n",
    "setup_module": "def setup_module(m):\n    global X\n    X = 2\ndef test_f(): assert f(X) == 4\n",
    "setup_function": "X = []\ndef setup_function(fn): X.append(2)\ndef teardown_function(): X.clear()\ndef test_f(): assert f(X[0]) == 4 and len(X) == 1\ndef test_g(): assert f(X[0]) == 4 and len(X) == 1\n",
    "setup_class": "class TestF:\n    @classmethod\n    def setup_class(cls): cls.x = 2\n    def test_f(self): assert f(self.x) == 4\n",
    "setup_method": "class TestF:\n    def setup_method(self, method): self.x = 2\n    def teardown_method(self): assert self.x == 2\n    def test_f(self): assert f(self.x) == 4\n",
    "an autouse fixture": "X = []\n@pytest.fixture(autouse=True)\ndef fresh():\n    X.append(2)\n    yield\n    X.clear()\ndef test_f(): assert f(X[0]) == 4 and len(X) == 1\ndef test_g(): assert f(X[0]) == 4 and len(X) == 1\n",
    "a fixture by another name": "@pytest.fixture(name='x')\ndef make_x(): return 2\ndef test_f(x): assert f(x) == 4\n",
    "one fixture, once": "@pytest.fixture\ndef xs(): return []\n@pytest.fixture\ndef filled(xs): xs.append(2)\ndef test_f(xs, filled): assert f(xs[0]) == 4\n",
    "skipif": "@pytest.mark.skipif(True, reason='n')\ndef test_f(): assert f(2) == 99\n@pytest.mark.skipif(False, reason='n')\ndef test_g(): assert f(2) == 4\n",
    "a default": "def test_f(x: int = 2): assert f(x) == 4\n",
    "what was raised": "def test_f():\n    with pytest.raises(ZeroDivisionError) as e: 1 / 0\n    assert e.type is ZeroDivisionError and e.match('division') and f(2) == 4\n",
    "complex and NaN": "def test_f(): assert 1 + 0j == pytest.approx(1 + 1e-9j) and float('nan') == pytest.approx(float('nan'), nan_ok=True) and f(2) == 4\n",
}  # fmt: skip


@pytest.mark.parametrize("name", RUN)
def test_what_is_run(verifier, name):
    task = Task(id="t", prompt="", verifier="code", payload={"tests": HEAD + RUN[name], "kind": "unittest"})
    verdict = verifier.verify(task, f"```python\n{RIGHT}\n```")
    assert verdict.status == "ok", verdict
    assert verifier.verify(task, f"```python\n{WRONG}\n```").status == "wrong"


@pytest.mark.parametrize(
    "tests",
    ["@pytest.mark.skip(reason='n')\ndef test_f(): assert f(2) == 4\n",
     "import unittest\nclass T(unittest.TestCase):\n    @unittest.skip('n')\n    def test_f(self): self.assertEqual(f(2), 4)\n"],
)  # fmt: skip
def test_a_task_whose_tests_are_all_skipped_is_unusable(verifier, tests):
    task = Task(id="t", prompt="", verifier="code", payload={"tests": HEAD + tests, "kind": "unittest"})
    with pytest.raises(ValueError, match="are all of them skipped"):
        verifier.verify(task, f"```python\n{RIGHT}\n```")


@pytest.mark.parametrize("source", [WRONG, "def g(x): return x"])
def test_a_program_that_makes_its_tests_skip_is_wrong(verifier, source):
    tests = HEAD + "def test_f():\n    if f(2) != 4: pytest.skip('n')\n    assert f(3) == 9\n"
    task = Task(id="t", prompt="", verifier="code", payload={"tests": tests, "kind": "unittest"})
    assert verifier.verify(task, f"```python\n{source}\n```").status == "wrong"
    assert verifier.verify(task, f"```python\n{RIGHT}\n```").status == "ok"


@pytest.mark.parametrize(
    "tests",
    ["@pytest.mark.asyncio\nasync def test_f():\n    assert await f(2) == 4\n",
     "class TestF:\n    async def test_f(self):\n        assert await f(2) == 4\n",
     "import unittest\nclass T(unittest.IsolatedAsyncioTestCase):\n    async def test_f(self): self.assertEqual(await f(2), 4)\n"],
)  # fmt: skip
def test_asynchronous_tests_are_waited_for(verifier, tests):
    task = Task(id="t", prompt="", verifier="code", payload={"tests": HEAD + tests, "kind": "unittest"})
    assert verifier.verify(task, f"```python\nasync {RIGHT}\n```").status == "ok"
    assert verifier.verify(task, f"```python\nasync {WRONG}\n```").status == "wrong"


def test_a_set_up_that_raises_is_a_failed_test(verifier):
    tests = HEAD + "class TestF:\n    def setup_method(self): self.x = f(2)\n    def test_f(self): assert self.x == 4\n"
    task = Task(id="t", prompt="", verifier="code", payload={"tests": tests})
    verdict = verifier.verify(task, "```python\ndef f(x): raise OSError\n```")
    assert (verdict.status, verdict.evidence["total"]) == ("wrong", 1), verdict


def test_an_object_of_the_program_is_no_fixture(verifier):
    """Marks are looked for on functions of the tests: asked, an object would say that it has them all."""
    lies = "class Yes:\n    def __getattr__(self, name): return True\nBOX = Yes()\n"
    tests = "import pytest\nfrom solution import f, BOX\nclass TestF:\n    def test_f(self): assert f(2) == 4\n"
    task = Task(id="t", prompt="", verifier="code", payload={"tests": tests})
    assert verifier.verify(task, f"```python\n{lies}{RIGHT}\n```").status == "ok"
    assert verifier.verify(task, f"```python\n{lies}{WRONG}\n```").status == "wrong"


@pytest.mark.parametrize(
    "tests",
    ["import pytest\nassert f(2) == 4\nwith pytest.raises(TypeError):\n    f('a')\n",
     "import pytest\ndef check(candidate):\n    assert candidate(2) == 4\n    with pytest.raises(TypeError): candidate('a')\n",
     "import pytest\ndef check(candidate):\n    assert candidate(2) == pytest.approx(4.0000001)\n"],
)  # fmt: skip
def test_assertions_outside_a_test_file_may_use_pytest(verifier, tests):
    task = Task(id="t", prompt="", verifier="code", payload={"tests": tests, "entry_point": "f"})
    assert verifier.verify(task, f"```python\n{RIGHT}\n```").status == "ok"
    assert verifier.verify(task, "```python\ndef f(x): return 3 if x == 2 else 1 + x\n```").status == "wrong"
    verdict = verifier.verify(task, "```python\ndef f(x): raise ModuleNotFoundError('no')\n```")
    assert (verdict.status, verdict.score) == ("wrong", 0.0)


@pytest.mark.parametrize(
    "tests",
    ["import nothing_here\nassert f(2) == 4", "import nothing_here.at_all as n\ndef check(candidate): assert n.f(candidate(2))",
     "import pytest, nothing_here\ndef test_f(): assert f(2) == 4",
     "def test_f():\n    import nothing_here\n    assert f(2) == 4",
     "import unittest\nclass T(unittest.TestCase):\n    def test_f(self):\n        from nothing_here import x\n        f(2)"],
)  # fmt: skip
def test_tests_that_import_what_is_not_there_are_an_unusable_task(verifier, tests):
    """Whatever the program does; but an error of that name that the program raises is its own."""
    task = Task(id="t", prompt="", verifier="code", payload={"tests": tests, "entry_point": "f"})
    for program in (RIGHT, WRONG):
        with pytest.raises(ValueError, match=r"import what the sandbox does not have: .*nothing_here"):
            verifier.verify(task, f"```python\n{program}\n```")
    tests = "try: import nothing_here\nexcept ImportError: pass\nassert f(2) == 4"
    guarded = Task(id="t", prompt="", verifier="code", payload={"tests": tests})
    assert verifier.verify(guarded, f"```python\n{RIGHT}\n```").status == "ok"


@pytest.mark.parametrize(
    "tests",
    [["def test_a():\n    assert f(2) == 4", "def test_b():\n    assert f(3) == 9"],
     ["import unittest\nclass A(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(2), 4)"],
     "import unittest\nclass A(unittest.TestCase):\n    def runTest(self): self.assertEqual(f(2), 4)"],
)  # fmt: skip
def test_what_defines_tests_is_run_as_a_file(verifier, tests):
    """A list of them too: as assertions they would be defined, and nobody would call them."""
    task = Task(id="t", prompt="", verifier="code", payload={"tests": tests})
    assert verifier.verify(task, f"```python\n{RIGHT}\n```").status == "ok"
    assert verifier.verify(task, f"```python\n{WRONG}\n```").status == "wrong"


LAZY = """
class Ctx:
    def __enter__(s): return s
    def __exit__(s, *a): return False
    def close(s): pass
    def f(s, x):
        import nothing_here
def f(x):
    import nothing_here
def g(x): return ModuleNotFoundError("no")
"""


@pytest.mark.parametrize(
    "tests",
    ["with Ctx() as c: assert c.f(1) == 1", "c = Ctx()\ntry:\n    assert c.f(1) == 1\nfinally:\n    c.close()",
     "try: assert f(1) == 1\nexcept Exception:\n    Ctx().close()\n    raise", "raise g(1)",
     "import pytest\nfrom solution import Ctx\nclass TestA:\n    def setup_method(self): self.c = Ctx()\n    def teardown_method(self): self.c.close()\n"
     "    def test_a(self): assert self.c.f(1) == 1\n"],
)  # fmt: skip
def test_what_the_program_imports_and_lacks_is_its_own_doing(verifier, tests):
    """Though the tests ask it something else before its error reaches their end."""
    tests = tests if "def test_" in tests else f"{tests}\nassert f(1) == 1 and Ctx().f(1) == 1"
    verdict = verifier.verify(Task(id="t", prompt="", verifier="code", payload={"tests": tests}), f"```python\n{LAZY}\n```")
    assert (verdict.status, verdict.score) == ("wrong", 0.0), verdict


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        ("@pytest.mark.xfail\ndef test_x(): assert f(2) == 5\n", "pytest.mark.xfail"),
        ("@pytest.fixture(params=[1, 2])\ndef x(request): return 1\ndef test_f(x): assert f(x)\n", "the argument params"),
        ("def test_f(tmp_path): assert f(tmp_path)\n", "the fixture 'tmp_path'"),
        ("class TestA:\n    def test_f(self, capsys): assert f(1)\n", "the fixture 'capsys'"),
        ("@pytest.fixture\ndef x(monkeypatch): return 1\ndef test_f(x): assert f(x)\n", "the fixture 'monkeypatch'"),
        ("def test_f():\n    with pytest.warns(UserWarning): f(1)\n", "pytest.warns"),
        ("from pytest import importorskip\ndef test_f(): assert f(1)\n", "pytest.importorskip"),
        ("import pytest as pt\ndef test_f(): pt.importorskip('x'); assert f(1)\n", "pytest.importorskip"),
        ("import pytest_asyncio\ndef test_f(): assert f(1)\n", "the module pytest_asyncio"),
        ("@pytest.mark.parametrize('x', [1], indirect=True)\ndef test_f(x): assert f(x)\n", "the argument indirect"),
        ("@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.skip)])\ndef test_f(x): assert f(x)\n", "the argument marks"),
        ("@pytest.mark.skipif('sys.version_info > (3,)', reason='n')\ndef test_f(): assert f(1)\n", "skipif as a text"),
        ("pytestmark = pytest.mark.skipif(False, reason='n')\ndef test_f(): assert f(1)\n", "pytestmark with skipif"),
        ("@pytest.fixture\nasync def x(): return 1\ndef test_f(x): assert f(x)\n", "the asynchronous fixture x"),
        ("def test_f():\n    yield f(1)\n", "a yield in the test test_f"),
        ("import unittest\nclass T(unittest.TestCase):\n    async def test_f(self): self.assertEqual(await f(1), 1)\n", "nobody would wait for"),
        ("import unittest\nclass T(unittest.TestCase):\n    @pytest.fixture\n    def x(self): return 1\n    def test_f(self): f(1)\n", "of a TestCase"),
        ("import unittest\n@pytest.fixture(autouse=True)\ndef x(): f(0)\nclass T(unittest.TestCase):\n    def test_f(self): f(1)\n", "around tests of a TestCase"),
    ],
)  # fmt: skip
def test_files_that_need_more_are_refused(tests, words):
    with pytest.raises(ValueError, match=f"need what is not there: .*{words}"):
        plan_of({"tests": HEAD + tests, "kind": "unittest"})


def test_files_that_need_nothing_odd_are_not_refused():
    files = (*RUN.values(), "import unittest\nclass Mine(unittest.TestCase): pass\nclass T(Mine):\n    def test_f(self, extra): pass\n",
             "class Client:\n    def test_link(self, host): pass\ndef test_f(): assert f(1)\n", "pytestmark = pytest.mark.asyncio\n",
             "@pytest.mark.slow\ndef test_f(): assert f(1)\n", "@pytest.mark.parametrize(['x', 'y'], [(1, 2)], ids=['a'])\ndef test_f(x, y): pass\n",
             "def test_f():\n    def g(): yield 1\n    assert f(*g())\n", "x = pytest.fixture(lambda: 1)\ndef test_f(x): pass\n")  # fmt: skip
    for tests in files:
        assert unsupported(ast.parse(HEAD + tests)) == "", tests


def test_tests_are_counted():
    source = (
        HEAD
        + "def test_a(): pass\n@pytest.mark.parametrize('x', [1, 2, 3])\ndef test_b(x): pass\n@pytest.mark.parametrize('x', range(9))\ndef test_c(x): pass\n"
    )
    source += "@pytest.mark.parametrize('y', (1, 2))\nclass TestD:\n    @pytest.mark.parametrize('x', [1, 2])\n    def test_d(self, x, y): pass\n    def helper(self): pass\n"
    assert count_tests(ast.parse(source)) == 1 + 3 + 1 + 4
