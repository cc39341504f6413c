"""Which names are the program's, what is rewritten, and which tasks are refused."""

# ruff: noqa: E501 (programs are data, one a line)

import pytest

from cabochon.verifiers.code_tests import Case, plan_of


def names(*tests, **more):
    return plan_of({"tests": list(tests), **more}).wanted


@pytest.mark.parametrize(
    ("tests", "want"),
    [
        (["assert f(1) == 2"], ("f",)),
        (["assert set(f([1])) == {1}", "assert sorted(f([2])) == [2]"], ("f",)),
        (["assert sum(10, 15) == 6"], ("sum",)),
        (["assert math.isclose(f(1), 2.0)"], ("f",)),
        (["assert isclose(f(1), 2.0)"], ("f",)),
        (["assert sqrt(4) == 2"], ("sqrt",)),
        (["assert size((1,)) == sys.getsizeof((1,))"], ("size",)),
        (["assert g(f(1)) == 2"], ("f", "g")),
        (["x = [1]\nassert f(x) == [y for y in x]"], ("f",)),
        (["import math\nassert f(math.pi) == 3"], ("f",)),
        (["def helper(a):\n    return a\nassert helper(f(1)) == 1"], ("f",)),
        (["assert f(lambda q: q, 1) == 1"], ("f",)),
    ],
)
def test_names(tests, want):
    assert names(*tests) == want


def test_entry_point_is_the_only_doubtful_name():
    plan = plan_of({"tests": ["assert isclose(gcd(4, 6), 2)"], "entry_point": "gcd"})
    assert plan.wanted == ("gcd",)
    assert plan.units[0].source == "from math import isclose"


def test_helpers_of_a_prompt_stay_with_the_tests():
    prompt = "import math\n\ndef poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\ndef find_zero(xs):\n    '''Finds it.'''\n"
    test = "def check(candidate):\n    assert math.fabs(poly([1, 2], candidate([1, 2]))) < 1e-4\n"
    plan = plan_of({"prompt": prompt, "test": test, "entry_point": "find_zero"})
    assert plan.wanted == ("find_zero",)
    assert "def poly" in plan.units[0].source
    assert "find_zero" not in plan.units[0].source
    assert plan.units[-1].source == "check(find_zero)"


def test_only_classes_that_are_used_as_such_are_open():
    assert plan_of({"tests": ["s = Stack()\nassert s.size() == 0"]}).classes == ("Stack",)
    assert plan_of({"tests": ["assert Vector(1) + Vector(2) == Vector(3)"]}).classes == ("Vector",)
    assert plan_of({"tests": ["assert 3 in Multiples(1)"]}).classes == ()  # it would be asked whether it holds the answer
    assert plan_of({"tests": ["assert math.pi in Multiples(1)"]}).classes == ()
    assert plan_of({"tests": "import pytest\nassert 3 in D(12)\nwith pytest.raises(ValueError): D(-1)"}).classes == ()
    assert plan_of({"tests": ["assert 3 in D(1) and ','.join(['a']) and {1}.issubset({1})"]}).classes == ()
    helpers = "def has(xs, x): return x in xs"
    assert plan_of({"tests": ["assert has(D(12), 3)"], "helpers": helpers}).classes == ()
    plan = plan_of({"tests": ["assert Celsius(3) + 1 == 4"]})
    assert (plan.classes, plan.kept) == (("Celsius",), ()), "a float with something on top is a float"
    assert plan_of({"tests": ["assert Stack().size == 0"]}).kept == ("Stack",)
    assert plan_of({"tests": ["assert abs(diff(1) - 3) < 1e-6"]}).classes == ()


def test_assertions_keep_their_meaning():
    plan = plan_of(
        {"tests": ["try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass", "assert f(2) == 3, 'why'"]}
    )
    assert [u.label.splitlines()[0] for u in plan.units] == ["try:", "assert f(2) == 3, 'why'"]

    class Recorder:
        def raise_failed(self, source, *shown):
            raise AssertionError(source, *shown)

    def f(x):
        if x == 1:
            raise ValueError
        return 4

    exec(plan.units[0].source, {"f": f, "_cabochon_": Recorder()})
    with pytest.raises(AssertionError) as error:
        exec(plan.units[1].source, {"f": f, "_cabochon_": Recorder()})
    assert error.value.args == ("assert f(2) == 3, 'why'", 4, 3)


def test_calls_become_assertions():
    calls = [{"args": [[1, 2], "x"], "expected": {"a": None}}, {"args": [], "kwargs": {"k": True}, "expected": 1.5}]
    plan = plan_of({"calls": calls, "entry_point": "Solution.run"})
    assert plan.wanted == ("Solution",)
    assert [u.label for u in plan.units if u.label] == [
        "assert Solution().run([1, 2], 'x') == {'a': None}",
        "assert Solution().run(k=True) == 1.5",
    ]


def test_cases():
    want = (Case(stdin="1", stdout="2"),)
    assert plan_of({"cases": [{"stdin": "1", "stdout": "2"}]}).cases == want
    assert plan_of({"cases": [{"input": "1", "output": "2"}]}).cases == want
    assert plan_of({"inputs": ["1"], "outputs": ["2"]}).cases == want


def test_test_files():
    plan = plan_of({"tests": "import unittest\nfrom solution import f, Box\nclass T(unittest.TestCase):\n    def test_a(self): f(Box())"})
    assert (plan.wanted, plan.classes, plan.bare_names, plan.collect) == (("Box", "f"), ("Box",), False, True)
    plan = plan_of({"tests": "import mine as m\ndef test_a():\n    assert m.f(1) == m.g(2)", "module": "mine"})
    assert plan.wanted == ("f", "g")
    made = "import unittest\nclass T(unittest.TestCase): pass\nfor i in 1, 2: setattr(T, f'test_{i}', lambda s: f(i))"
    assert plan_of({"tests": made}).collect


def test_assertions_that_only_import_a_framework_are_no_test_file():
    raises = "with pytest.raises(TypeError):\n    f('a')"
    plan = plan_of({"tests": f"import pytest\nfrom unittest.mock import Mock\nassert f(1) == 2\n{raises}"})
    assert not plan.collect
    assert [unit.label for unit in plan.units if unit.tests] == ["assert f(1) == 2", raises]
    with pytest.raises(ValueError, match=r"need what is not there: pytest\.warns"):
        plan_of({"tests": "import pytest\nassert f(1) == 2\nwith pytest.warns(UserWarning): f(2)"})


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ({}, "needs payload\\['tests'\\]"),
        ({"tests": []}, "needs payload\\['tests'\\]"),
        ({"tests": ["assert f( == 2"]}, "tests do not parse"),
        ({"tests": "x = f(1)"}, "nothing would be judged"),
        ({"cases": []}, "without tests"),
        ({"cases": 5}, "must be a list.*got int '5'"),
        ({"cases": [{"stdin": 5, "stdout": "x"}]}, "needs the texts"),
        ({"cases": [{"stdin": "5"}]}, "needs the texts.*got an object with the keys \\['stdin'\\]"),
        ({"cases": ["a"]}, "cases'\\]\\[0\\] needs the texts 'stdin' and 'stdout', got str 'a'"),
        ({"kind": "stdio"}, "needs payload\\['cases'\\].*got none and none"),
        ({"inputs": ["1"], "outputs": ["1", "2"]}, "got a list of 1 and a list of 2"),
        ({"inputs": "1", "outputs": "2"}, "got str '1' and str '2'"),
        ({"calls": 5, "entry_point": "f"}, "at least one call"),
        ({"calls": [{"args": 1, "expected": 2}], "entry_point": "f"}, "'args' as a list"),
        ({"calls": [{"kwargs": [1], "expected": 2}], "entry_point": "f"}, "'kwargs' as an object"),
        ({"calls": ["f(1)"], "entry_point": "f"}, "calls'\\]\\[0\\] needs 'expected'"),
        ({"tests": "assert 1 + 1 == 2"}, "uses? nothing of the program"),
        ({"tests": "assert g(1) == 2", "helpers": "def g(x): return x + 1"}, "uses? nothing of the program"),
        ({"calls": [{"args": []}], "entry_point": "f"}, "'expected'"),
        ({"calls": [{"args": [], "expected": 1}]}, "entry_point"),
        ({"kind": "odd", "tests": ["assert f()"]}, "must be asserts, calls, stdio or unittest"),
        ({"kind": "unittest", "tests": "def test_a():\n    assert 1"}, "uses nothing of the program"),
        ({"kind": "unittest", "tests": "import unittest\nassert f(1) == 2"}, "holds no test"),
        ({"tests": ["def test_a():\n    assert f(1) == 2", "def test_a():\n    assert f(2) == 3"]}, "define test_a twice"),
        ({"tests": ["f(1) == 2"]}, "compare without an assertion: f"),
        ({"tests": ["assert (f(1) == 2, 'why')"]}, "assert a tuple"),
        ({"tests": "def check(candidate):\n    assert candidate(1) == 2\nassert f(2) == 3"}, "nobody calls it"),
        ({"tests": "assert eval(f([4, 6])) == 24"}, "eval\\(f\\(\\[4, 6\\]\\)\\), which would run there what the program says"),
        ({"tests": "import pickle\nassert pickle.loads(f(3)) == 3"}, "pickle.loads"),
        ({"tests": "import importlib\nassert importlib.import_module(f(3))"}, "importlib.import_module"),
        ({"tests": "import unittest\nclass T(unittest.TestCase):\n    def check_a(self): f(1)"}, "holds no test"),
    ],
)
def test_unusable_tasks(payload, words):
    with pytest.raises(ValueError, match=words):
        plan_of(payload)


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        ("from unittest.mock import patch\ndef test_a():\n    with patch('builtins.input', return_value='1'): assert f() == 1", "patch"),
        ("from unittest import mock\n@mock.patch('solution.g', 3)\ndef test_a(): assert f() == 1", "mock.patch"),
        ("import unittest.mock\ndef test_a():\n    with unittest.mock.patch.object(dict, 'x'): assert f() == 1", "unittest.mock.patch"),
        ("import io, contextlib\ndef test_a():\n    out = io.StringIO()\n    with contextlib.redirect_stdout(out): f()\n    assert out.getvalue() == 'x'", "redirect_stdout"),
        ("import io, sys\ndef test_a():\n    sys.stdout = io.StringIO()\n    f()\n    assert sys.stdout.getvalue() == 'x'", "a change of sys.stdout"),
        ("import os\ndef test_a():\n    os.environ['A'] = '1'\n    assert f() == 1", "a change of os.environ"),
        ("import tempfile\ndef test_a():\n    with tempfile.TemporaryDirectory() as d: assert f(d) == 1", "tempfile.TemporaryDirectory"),
        ("def test_a():\n    with open('x', 'w') as out: out.write('1')\n    assert f('x') == 1", "open"),
        ("import inspect\ndef test_a(): assert inspect.signature(f).parameters", "inspect.signature"),
        ("import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        with self.assertLogs('x'): f()", "self.assertLogs"),
        ("class Mine(Base): pass\ndef test_a(): assert f(Mine()) == 1", "a class Mine derived from the program's Base"),
    ],
)  # fmt: skip
def test_tests_that_need_the_programs_own_process_are_refused(tests, words):
    with pytest.raises(ValueError, match=f"in their own process: .*{words}"):
        plan_of({"tests": "from solution import f, Base\n" + tests, "kind": "unittest"})
    if "Mine" in tests:
        with pytest.raises(ValueError, match=words):
            plan_of({"tests": "import solution as s\n" + tests.replace("(Base)", "(s.Base)"), "kind": "unittest"})
        with pytest.raises(ValueError, match=words):
            plan_of({"tests": ["class Mine(Base): pass\nassert f(Mine()) == 1"]})


@pytest.mark.parametrize(
    "tests",
    ["# TestCase 1\nassert f(1) == 3", "def check(candidate):\n    assert candidate('TestCase') == 8",
     "# see def test_f\nassert f(1) == 3", "assert f('def test_a(): pass') == 1",
     "def test_case(a, w):\n    assert f(a) == w\ntest_case(1, 1)", ["def test_case(a, w):\n    assert f(a) == w\ntest_case(1, 1)"],
     "def check(candidate):\n    def test_one(x): assert candidate(x) == 1\n    test_one(1)",
     "import unittest\nt = unittest.TestCase()\nt.assertEqual(f(1), 3)"],
)  # fmt: skip
def test_what_only_mentions_a_test_is_a_list_of_assertions(tests):
    plan = plan_of({"tests": tests, "entry_point": "f"})
    assert not plan.collect
    assert sum(unit.tests for unit in plan.units) >= 1


def test_modules_by_their_usual_names_are_not_the_programs():
    plan = plan_of({"tests": "assert np.allclose(f(1), 1.0)"})
    assert plan.wanted == ("f",)
    assert "import numpy as np" in plan.units[0].source
    assert plan_of({"tests": "from solution import f, g\nassert f(1) == g(2)"}).wanted == ("f", "g")


def test_a_comparison_that_is_to_raise_is_a_test():
    tests = "import pytest\nwith pytest.raises(TypeError):\n    f(1) < 'a'"
    assert [unit.tests for unit in plan_of({"tests": tests}).units if unit.tests] == [1]


def test_names_that_only_look_like_it_are_not_refused():
    for tests in ("d = Door()\nd.open()\nassert d.is_open", "c = Client()\nassert c.patch('x').path == 'x'", "assert open(3) == 4",
                  "import sys\nassert f(sys.stdout.encoding) == 1", "class A: pass\nclass B(A): pass\nassert f(B()) == 1",
                  "from unittest.mock import Mock\nm = Mock()\nf(m)\nm.open.assert_called_once_with()"):  # fmt: skip
        assert plan_of({"tests": [tests]}).wanted, tests


def test_a_test_file_may_look_at_arguments_and_results():
    payload = {"tests": "from solution import f\ndef test_a():\n    xs = []\n    assert f(xs) == 1 and xs == [1]"}
    assert plan_of(payload).mutates is False
    assert plan_of({**payload, "mutates": True}).mutates is True
