"""What crosses between a program and its tests by value, by reference and by call-back: each as in one process."""

# ruff: noqa: E501 (programs are data, one a line)

import pytest
from boxes import check, judged, verifiers

from cabochon.verifiers.sandbox.base import Limits

LIMITS = Limits(wall_seconds=20.0, cpu_seconds=8.0, memory_bytes=400 << 20)
both, verifier = verifiers(LIMITS)


ALIAS = {
    "rows that are one": ("g = grid(2)\ng[0][0] = 1\nassert g == [[1, 0], [0, 0]]", "def grid(n): return [[0] * n for _ in range(n)]", "def grid(n): return [[0] * n] * n"),
    "rows in a dict": ("d = groups('ab')\nd['a'].append(1)\nassert d == {'a': [1], 'b': []}", "def groups(s): return {c: [] for c in s}", "def groups(s): return dict.fromkeys(s, [])"),
    "sets and deques": ("a, b = pair()\na.add(1)\nassert b == set()\nc, d = queues()\nc.append(1)\nassert len(d) == 0", "from collections import deque\ndef pair(): return set(), set()\ndef queues(): return [deque(), deque()]", "from collections import deque\ndef pair():\n    s = set(); return s, s\ndef queues(): return [deque()] * 2"),
    "aliases given": ("row = [0]\nf([row, row])\nassert row == [2]", "def f(rows):\n    for r in rows: r[0] += 1", "def f(rows):\n    for r in rows: r[0] = 1"),
    "aliases seen": ("row = [0]\nassert same([row, row]) is True and same([[0], [0]]) is False", "def same(rows): return rows[0] is rows[1]", "def same(rows): return rows[0] == rows[1]"),
    "returned itself": ("xs = [1, 2]\nassert f(xs) is xs", "def f(xs): return xs", "def f(xs): return list(xs)"),
    "returned a copy": ("xs = [1, [2]]\nys = copy(xs)\nassert ys == xs and ys is not xs and ys[1] is not xs[1]", "import copy as c\ndef copy(xs): return c.deepcopy(xs)", "def copy(xs): return list(xs)"),
    "returned a part": ("g = {'a': [1]}\nget(g, 'a').append(2)\nassert g == {'a': [1, 2]}", "def get(g, k): return g[k]", "def get(g, k): return list(g[k])"),
    "no default that is shared": ("a = add(1)\na.append(9)\nassert add(2) == [2]", "def add(x, xs=None):\n    xs = [] if xs is None else xs\n    xs.append(x); return xs", "def add(x, xs=[]):\n    xs.append(x); return xs"),
}  # fmt: skip

@pytest.mark.parametrize("name", ALIAS)
def test_what_is_one_object_stays_one(verifier, name):
    check(verifier, *ALIAS[name])


CHANGES = {
    "deque": ("from collections import deque\nq = deque([1, 2, 3], maxlen=3)\nassert f(q) is None\nassert q == deque([2, 3, 1]) and q.maxlen == 3", "def f(q): q.rotate(-1)", "def f(q): pass"),
    "Counter": ("from collections import Counter\nc = Counter('ab')\nf(c)\nassert c == Counter(a=2, b=1)", "def f(c): c.update('a')", "def f(c): c.subtract('a')"),
    "defaultdict": ("from collections import defaultdict\nd = defaultdict(list)\nf(d, 'x', 1)\nassert d == {'x': [1]} and d['y'] == []", "def f(d, k, v): d[k].append(v)", "def f(d, k, v): d[k]"),
    "OrderedDict": ("from collections import OrderedDict\nd = OrderedDict(a=1, b=2)\nf(d)\nassert list(d) == ['b', 'a']", "def f(d): d.move_to_end('a')", "def f(d): d['b'] = d['b']"),
    "bytearray": ("b = bytearray(b'abc')\nf(b)\nassert b == b'cba'", "def f(b): b.reverse()", "def f(b): b[:] = b"),
    "set": ("s = {1, 2}\nf(s)\nassert s == {2}", "def f(s): s.discard(1)", "def f(s): s.discard(2)"),
    "a keyword": ("d, xs = {}, []\nf(d=d, xs=xs)\nassert (d, xs) == ({1: 2}, [3])", "def f(d, xs): d[1] = 2; xs.append(3)", "def f(d, xs): d[1] = 2"),
    "inside": ("g = [[0, 0], [0, 0]]\nrow = g[0]\nf(g)\nassert row == [1, 0] and g[0] is row", "def f(g): g[0][0] = 1", "def f(g): g[0] = [1, 0]"),
    "in a tuple": ("a, b = [1], [2]\nswap((a, b))\nassert (a, b) == ([2], [1])", "def swap(p): p[0][:], p[1][:] = p[1][:], p[0][:]", "def swap(p): p = p[1], p[0]"),
    "before it raises": ("xs = [1]\ntry:\n    f(xs)\nexcept ValueError:\n    pass\nassert xs == [1]", "def f(xs): raise ValueError", "def f(xs): xs.append(2); raise ValueError"),
    "a bound method": ("xs = [3, 1]\nS().sort(xs)\nassert xs == [1, 3]", "class S:\n    def sort(self, xs): xs.sort()", "class S:\n    def sort(self, xs): sorted(xs)"),
    "by a callback": ("assert fold(lambda acc, x: acc.append(x * 2), [1, 2], []) == [2, 4]", "def fold(f, xs, acc):\n    for x in xs: f(acc, x)\n    return acc", "def fold(f, xs, acc):\n    for x in xs: f(list(acc), x)\n    return acc"),
    "named as nobody else may be": ("xs = []\nassert f(target=1, op=2, self=3, name=4, args=xs, cls=6, thing=7) is None and xs == [1, 2, 3, 4, 6, 7]\nassert Box(target=1, op=2).call(op=3, target=4, cls=5) == [1, 2, 3, 4, 5]", "def f(target, op, self, name, args, cls, thing): args.extend([target, op, self, name, cls, thing])\nclass Box:\n    def __init__(me, target, op): me.v = [target, op]\n    def call(me, op, target, cls): return me.v + [op, target, cls]", "def f(target, op, self, name, args, cls, thing): args.extend([target, op, self, name, thing])\nclass Box:\n    def __init__(me, target, op): me.v = [target, op]\n    def call(me, op, target, cls): return me.v + [op, target, cls]"),
    "with what was there": ("a, b = [1], [2]\nxs = [a]\nf(xs, b)\nassert xs[1] is b and xs[0] is a", "def f(xs, b): xs.append(b)", "def f(xs, b): xs.append(list(b))"),
}  # fmt: skip

@pytest.mark.parametrize("name", CHANGES)
def test_changes_to_arguments_are_seen(verifier, name):
    check(verifier, *CHANGES[name])


CALLBACKS = {
    "an iterator": ("assert f(iter([1, 2])) == 3 and f(x for x in range(4)) == 6 and f(map(int, '12')) == 3 and f(zip([1], [2])) == (1, 2)", "def f(xs):\n    xs = list(xs)\n    return sum(xs) if type(xs[0]) is int else xs[0]", "def f(xs):\n    return sum(list(xs)[1:])"),
    "not used up": ("it = iter([1, 2, 3])\nassert first(it) == 1 and next(it) == 2", "def first(it): return next(it)", "def first(it): return list(it)[0]"),
    "a generator that is driven": ("def gen():\n    got = yield 1\n    out.append(got)\n    yield 2\nout = []\nassert drive(gen()) == [1, 2] and out == ['x']", "def drive(g): return [next(g), g.send('x')]", "def drive(g): return [next(g), next(g)]"),
    "a file": ("import io\nout = io.StringIO()\nassert count(io.StringIO('a\\nb\\n'), out) == 2 and out.getvalue() == 'ab'\nassert size(io.BytesIO(b'abc')) == 3", "def count(f, out):\n    n = 0\n    for line in f: n += 1; out.write(line.strip())\n    return n\ndef size(f): return len(f.read())", "def count(f, out): return len(f.read().split())\ndef size(f): return len(f.read())"),
    "with a file": ("import io\nassert read(io.StringIO('abc')) == 'abc'", "def read(f):\n    with f: return f.read()", "def read(f):\n    with f: return f.read(2)"),
    "an object": ("class P:\n    def __init__(self, x): self.x = x\n    def double(self): return 2 * self.x\np = P(3)\nassert f(p) == 9 and p.x == 4 and p.seen is p", "def f(p):\n    out = p.x + p.double(); p.x += 1; p.seen = p\n    return out", "def f(p): return p.x + p.double()"),
    "linked nodes": ("class N:\n    def __init__(self, v, next=None): self.v, self.next = v, next\nhead = N(1, N(2, N(3)))\nhead = rev(head)\nout = []\nwhile head: out.append(head.v); head = head.next\nassert out == [3, 2, 1]", "def rev(n):\n    prev = None\n    while n: n.next, prev, n = prev, n, n.next\n    return prev", "def rev(n):\n    prev = None\n    while n.next: n.next, prev, n = prev, n, n.next\n    return prev"),
    "operators of the tests": ("class Q:\n    def __init__(self, x): self.x = x\n    def __lt__(self, o): return self.x < o.x\n    def __add__(self, o): return Q(self.x + o.x)\n    def __eq__(self, o): return self.x == o.x\n    def __hash__(self): return hash(self.x)\n    def __len__(self): return self.x\n    def __repr__(self): return f'Q{self.x}'\na, b = Q(2), Q(1)\nassert order([a, b]) == [b, a] and order([a, b])[0] is b and add(a, b).x == 3 and uniq([Q(1), Q(1)]) == 1 and text(a) == 'Q2/2'", "def order(xs): return sorted(xs)\ndef add(a, b): return a + b\ndef uniq(xs): return len(set(xs))\ndef text(x): return f'{x!r}/{len(x)}'", "def order(xs): return xs\ndef add(a, b): return a + b\ndef uniq(xs): return len(set(xs))\ndef text(x): return f'{x!r}/{len(x)}'"),
    "an exception class": ("class Flaky(Exception): pass\ncalls = []\ndef work():\n    calls.append(1)\n    if len(calls) < 3: raise Flaky('no')\n    return 'done'\nassert retry(work, Flaky, 5) == 'done' and len(calls) == 3\ntry:\n    retry(work2, Flaky, 2)\n    assert False\nexcept KeyError:\n    pass".replace("retry(work2", "retry({}.__getitem__.__call__ and (lambda: {}['x'])"), "def retry(f, kind, n):\n    for i in range(n):\n        try: return f()\n        except kind:\n            if i == n - 1: raise", "def retry(f, kind, n):\n    for i in range(n):\n        try: return f()\n        except Exception:\n            if i == n - 1: raise RuntimeError"),
    "builtin exception classes": ("def bad(): raise ValueError('x')\nassert guard(bad, (ValueError, KeyError)) == 'x' and guard(lambda: 3, ValueError) == 3 and kinds() == [ValueError, KeyError]", "def guard(f, kinds):\n    try: return f()\n    except kinds as e: return str(e)\ndef kinds(): return [ValueError, KeyError]", "def guard(f, kinds):\n    try: return f()\n    except KeyError as e: return str(e)\ndef kinds(): return [ValueError, KeyError]"),
    "the tests' exception comes home": ("class Mine(Exception):\n    def __init__(self, n): self.n = n\ndef bad(): raise mine\nmine = Mine(4)\ntry:\n    call(bad)\n    assert False\nexcept Mine as e:\n    assert e is mine and e.n == 4", "def call(f): return f()", "def call(f):\n    try: return f()\n    except Exception as e: raise ValueError(str(e))"),
    "a class of the tests": ("class Dog:\n    def __init__(self, n='d'): self.n = n\nd = make(Dog, 'rex')\nassert type(d) is Dog and d.n == 'rex' and is_a(d, Dog) is True and is_a(3, Dog) is False", "def make(c, *a): return c(*a)\ndef is_a(x, c): return isinstance(x, c)", "def make(c, *a): return c()\ndef is_a(x, c): return isinstance(x, c)"),
    "a mock": ("from unittest.mock import Mock, MagicMock\nm = Mock(return_value=5)\nassert run(m, 2) == 5\nm.assert_called_once_with(2)\ns = MagicMock()\nnotify(s, 'x')\ns.send.assert_called_once_with('x')", "def run(f, x): return f(x)\ndef notify(s, t): s.send(t)", "def run(f, x): return f(x)\ndef notify(s, t): s.send(t); s.send(t)"),
    "a seeded generator": ("import random\nassert pick(random.Random(3), [1, 2, 3, 4, 5]) == random.Random(3).choice([1, 2, 3, 4, 5])", "def pick(rng, xs): return rng.choice(xs)", "def pick(rng, xs): return 6"),
    "an asynchronous callback": ("import pytest\nfrom solution import run\n@pytest.mark.asyncio\nasync def test_a():\n    async def cb(x): return x + 1\n    assert await run(cb, 2) == 3\n", "async def run(cb, x): return await cb(x)", "async def run(cb, x): return x"),
    "a path and an id": ("from pathlib import Path\nimport uuid\nassert ext(Path('a/b.txt')) == '.txt' and up(Path('a/b')) == Path('a') and str(idem(uuid.UUID(int=5))) == str(uuid.UUID(int=5))", "def ext(p): return p.suffix\ndef up(p): return p.parent\ndef idem(u): return u", "def ext(p): return p.suffix\ndef up(p): return p\ndef idem(u): return u"),
    "named tuples": ("r = f()\nassert r.x == 1 and r == (1, 2) and r._fields == ('x', 'y') and list(r) == [1, 2]", "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)", "from collections import namedtuple\nP = namedtuple('P', 'y x')\ndef f(): return P(1, 2)"),
}  # fmt: skip

@pytest.mark.parametrize("name", CALLBACKS)
def test_what_the_tests_hand_over_can_be_used(verifier, name):
    check(verifier, *CALLBACKS[name])


def test_both_sandboxes_agree(both):
    for case in (ALIAS["rows that are one"], CHANGES["deque"], CHANGES["a keyword"], CALLBACKS["an object"], CALLBACKS["a file"]):
        check(both, *case)


def test_a_file_of_tests_may_look_at_arguments_and_results(verifier):
    tests = "from solution import f\ndef test_a():\n    xs = [2, 1]\n    ys = f(xs)\n    assert ys is xs and xs == [1, 2]\n"
    for right, wrong in [("def f(xs): xs.sort(); return xs", "def f(xs): return sorted(xs)")]:
        assert judged(verifier, right, tests, mutates=True).status == "ok"
        assert judged(verifier, wrong, tests, mutates=True).status == "wrong"


HANDED = """
from unittest.mock import MagicMock
import io, random
EXPECT = 123456789
class P:
    word = 'w'
    def __init__(self): self.x = 1
    def double(self): return 2 * self.x
    def check(self): assert self.x == EXPECT
def gen(): yield 1
def back(): return 1
p, mock, error = P(), MagicMock(), ValueError('x')
assert f([p, P, gen(), back, p.double, mock, io.StringIO('a'), random.Random(1), error, iter([1])]) == EXPECT
"""
SEARCH = """
import gc, sys
Link = sys.modules['cabochon.verifiers.sandbox.inside_remote'].Link
def f(things):
    link = next(o for o in gc.get_objects() if isinstance(o, Link))
    found, todo, seen = [], [], 0
    names = ['__globals__', '__dict__', '__class__', '__init__', '__self__', '__func__', '__code__', '__traceback__', 'gi_frame', 'gi_code', 'f_globals', 'tb_frame', '__builtins__', '__module__', '__subclasses__', '__reduce__', '__wrapped__', '__closure__', 'check', 'double', 'x', 'send', 'modules', '_cabochon_', 'EXPECT', 'side_effect', 'return_value', 'configure_mock', 'raw', 'buffer']
    ops = [('get', (n,)) for n in names] + [('__getattribute__', (n,)) for n in names] + [('__reduce_ex__', (4,)), ('__dir__', ()), ('class', ()), ('error', ()), ('itself', ()), ('plain', ()), ('iter', ()), ('repr', ()), ('call', ()), ('call', ('EXPECT',)), ('__call__', ()), ('getitem', ('EXPECT',)), ('__getitem__', ('EXPECT',)), ('isinstance', (3,)), ('await', ())]
    for number in range(60):
        for op, args in ops:
            try: got = link.ask(number, op, *args)
            except BaseException as e: continue
            if got == 123456789 or '123456789' in repr(got): return 123456789
            if type(got) is dict and 'EXPECT' in got: return got['EXPECT']
    return 0
"""
CHANGING = "def f(things):\n    for t in things:\n        for name, new in {new}:\n            try: setattr(t, name, new)\n            except Exception: pass\n    return 1"


def test_what_is_handed_over_leads_nowhere_else(verifier):
    verdict = judged(verifier, SEARCH, HANDED)
    assert (verdict.status, verdict.evidence["passed"]) == ("wrong", 0), verdict
    assert judged(verifier, SEARCH.replace("return 0", "return 123456789"), HANDED).status == "ok"


def test_a_failed_assertion_in_a_callback_does_not_say_what_was_expected(verifier):
    tests = "def cb(x): assert x == 12345\ntry:\n    f(cb)\nexcept AssertionError:\n    assert False"
    assert judged(verifier, "def f(cb): cb(12345)", tests).status == "ok"
    assert judged(verifier, "def f(cb):\n    try: cb(0)\n    except AssertionError as e:\n        import re\n        s = ' '.join(map(str, (e, e.args, vars(e), repr(e))))\n        cb(int(re.search(r'\\d{5}', s)[0]))", tests).status == "wrong"


@pytest.mark.parametrize(
    ("tests", "new"),
    [
        ("class P:\n    x = 1\n    def check(self): assert self.x == 2\np = P()\nf([p])\np.check()", "[('check', lambda *a: None)]"),
        ("class P:\n    x = 1\n    def check(self): assert self.x == 2\np = P()\nf([P])\np.check()", "[('check', lambda *a: None)]"),
        ("from unittest.mock import Mock\nm = Mock()\nf([m])\nm.assert_called_once_with(3)", "[('assert_called_once_with', lambda *a: None), ('called', True), ('call_count', 1), ('call_args', ((3,), {})), ('mock_calls', [])]"),
        ("from unittest.mock import Mock\nm = Mock()\nf([m])\nassert m.call_count == 1", "[('call_count', 1), ('called', True)]"),
        ("import io\nout = io.StringIO()\nf([out])\nassert out.getvalue() == 'x'", "[('getvalue', lambda: 'x')]"),
    ],
)  # fmt: skip
def test_what_the_tests_ask_is_not_replaced(verifier, tests, new):
    assert judged(verifier, CHANGING.replace("{new}", new), tests).status == "wrong"


def test_arguments_that_cannot_cross_are_the_tasks_doing(verifier):
    """Whatever a test expects of such a call, no program is judged by it."""
    knot = "xs = [1]\nxs.append(xs)\n"
    for tests in (knot + "assert f(xs) == 2", knot + "assert f([1]) == 1\ntry:\n    f(xs)\n    assert False\nexcept ValueError:\n    pass", "assert f('x' * (9 << 20)) == 1"):
        for source in ("def f(xs): return len(xs)", "def f(xs): raise ValueError"):
            if "f([1]) == 1" in tests and "raise" in source:
                continue
            with pytest.raises(ValueError, match="cannot cross"):
                judged(verifier, source, tests)


def test_a_knot_tied_in_an_argument_is_refused(verifier):
    assert judged(verifier, "def f(xs): xs.append(xs)", "xs = [1]\nf(xs)\nassert len(xs) == 2").status == "malformed"
    laughs = "def f(xs):\n    for i in range(len(xs) - 1): xs[i][:] = [xs[i + 1]] * 2\n"
    tests = "xs = [[] for _ in range(60)]\nf(xs)\nassert repr(xs)"
    assert judged(verifier, laughs, tests).status == "malformed"
    moved = "def fix(m):\n    row = m[0]\n    m.clear()\n    row.append(row)\ndef total(r): return sum(r)\n"
    tests = "row = [2, 1]\nm = [row]\nfix(m)\nassert total(row) == 3"
    assert judged(verifier, moved, tests).status == "malformed", "though it is no longer in what was given"
