"""Classes, objects and exceptions that live in the program, as its tests see them: each as in one process."""

# ruff: noqa: E501 (programs are data, one a line)

import pytest
from boxes import check, judged, verifiers

from cabochon.verifiers.sandbox.base import Limits

LIMITS = Limits(wall_seconds=20.0, cpu_seconds=8.0, memory_bytes=400 << 20)
_, verifier = verifiers(LIMITS)
S = "class Shape:\n    def area(self): return 0\nclass Circle(Shape):\n    def __init__(self, r): self.r = r\n    def area(self): return 3 * self.r ** 2\nclass Ring(Circle): pass\ndef make(r): return Ring(r)\n"
E_ = "from enum import Enum\nclass Color(Enum):\n    RED = 1\n    GREEN = 2\n    CRIMSON = 1\ndef pick(n): return Color(n)\n"
V = """
class V:
    def __init__(self, x): self.x = x
    def __add__(self, o): return V(self.x + (o.x if isinstance(o, V) else o)) if isinstance(o, (V, int)) else NotImplemented
    def __radd__(self, o): return V(o + self.x)
    def __sub__(self, o): return V(self.x - o.x)
    def __rsub__(self, o): return V(o - self.x)
    def __mul__(self, n): return V(self.x * n)
    __rmul__ = __mul__
    def __iadd__(self, o): self.x += o.x; return self
    def __truediv__(self, n): return V(self.x / n)
    def __floordiv__(self, n): return V(self.x // n)
    def __mod__(self, n): return V(self.x % n)
    def __divmod__(self, n): return V(self.x // n), V(self.x % n)
    def __pow__(self, n, m=None): return V(pow(self.x, n, m))
    def __lshift__(self, n): return V(self.x << n)
    def __and__(self, o): return V(self.x & o.x)
    def __or__(self, o): return V(self.x | o.x)
    def __xor__(self, o): return V(self.x ^ o.x)
    def __neg__(self): return V(-self.x)
    def __pos__(self): return V(self.x)
    def __invert__(self): return V(~self.x)
    def __abs__(self): return abs(self.x)
    def __int__(self): return int(self.x)
    def __float__(self): return float(self.x)
    def __complex__(self): return complex(self.x)
    def __index__(self): return self.x
    def __round__(self, n=None): return round(self.x, n) if n is not None else round(self.x)
    def __floor__(self): return self.x
    def __eq__(self, o): return isinstance(o, V) and self.x == o.x
    def __lt__(self, o): return self.x < o.x
    def __le__(self, o): return self.x <= o.x
    def __hash__(self): return hash(self.x)
    def __bool__(self): return self.x != 0
    def __format__(self, spec): return 'V' + format(self.x, spec)
    def __repr__(self): return f'V({self.x})'
    def __bytes__(self): return b'v'
"""
B = """
class Bag:
    def __init__(self, items=()): self.items = list(items)
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return Bag(self.items[i]) if isinstance(i, slice) else self.items[i]
    def __setitem__(self, i, v): self.items[i] = v
    def __delitem__(self, i): del self.items[i]
    def __contains__(self, x): return x in self.items
    def __iter__(self): return iter(self.items)
    def __reversed__(self): return reversed(self.items)
    def __call__(self, n, *, k=1): return n * k * len(self.items)
"""
X = """
class AppError(Exception):
    kind = 'app'
    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code
    def as_dict(self): return {'code': self.code}
class NotFound(AppError, LookupError): pass
class Loud(AppError):
    def __str__(self): return super().__str__().upper()
class Plain(ValueError): pass
def find(n):
    if n == 1: raise NotFound('one', code=404)
    if n == 2: raise Loud('two', 2)
    if n == 3:
        try: {}['k']
        except KeyError as e: raise AppError('three') from e
    if n == 4: raise Plain('a', 4)
    if n == 5: raise KeyError('k')
    if n == 6:
        e = ValueError('v'); e.hint = 'h'; raise e
    if n == 7: raise FileNotFoundError(2, 'No such file', 'x.txt')
    if n == 8: import json; json.loads('{')
    if n == 9: import sys; sys.exit(3)
    if n == 10: raise KeyboardInterrupt
    if n == 11: raise StopIteration(5)
    if n == 12: return 1 / 0
    return [NotFound('kept', 7), ValueError('v')]
"""


def t(body):
    return "try:\n    " + body[0] + "\n    raise RuntimeError('nothing raised')\nexcept " + body[1] + ":\n    " + "\n    ".join(body[2:]) + "\nassert True"


CLASSES = {
    "isinstance": ("c = Circle(2)\nassert isinstance(c, Circle) and isinstance(c, Shape) and not isinstance(c, Ring)\nassert isinstance(make(1), Shape)", S, S.replace("(Shape)", "")),
    "issubclass": ("assert issubclass(Circle, Shape) and not issubclass(Shape, Circle) and issubclass(Ring, Shape)", S, S.replace("(Shape)", "")),
    "bases": ("assert Circle.__bases__ == (Shape,) and Ring.__mro__[:3] == (Ring, Circle, Shape) and Circle.__name__ == 'Circle'\nassert Shape().area() == 0", S, S.replace("(Shape)", "")),
    "type of": ("assert type(Circle(1)) is Circle and type(make(1)) is not Circle and type(make(1)).__name__ == 'Ring'", S, S.replace("Ring(r)", "Circle(r)")),
    "open attributes": ("c = Circle(2)\nc.r = 3\nc.label = 'x'\nassert c.r == 3 and c.area() == 27 and c.label == 'x' and hasattr(c, 'r') and not hasattr(c, 'q')\ndel c.label\nassert not hasattr(c, 'label')", S, S.replace("3 * self.r", "self.r")),
    "class attributes": ("Circle(1)\nbefore = Cfg.n\nCfg.n = 5\nassert before == 1 and Cfg().get() == 5", S + "class Cfg:\n    n = 1\n    def get(self): return self.n", S + "class Cfg:\n    n = 1\n    def get(self): return 1"),
    "abstract": ("import pytest\nfrom solution import Base, Sub\ndef test_a():\n    with pytest.raises(TypeError): Base()\n    assert isinstance(Sub(), Base)\n", "from abc import ABC, abstractmethod\nclass Base(ABC):\n    @abstractmethod\n    def f(self): ...\nclass Sub(Base):\n    def f(self): return 1", "class Base: pass\nclass Sub(Base): pass"),
    "protocol": ("assert isinstance(Duck(), Quacks) and not isinstance(Dog(), Quacks)\nassert Duck().quack() == 1", "from typing import Protocol, runtime_checkable\n@runtime_checkable\nclass Quacks(Protocol):\n    def quack(self): ...\nclass Duck:\n    def quack(self): return 1\nclass Dog: pass", "class Quacks: pass\nclass Duck:\n    def quack(self): return 1\nclass Dog: pass"),
    "static and class methods": ("assert T.parse('3').v == 3 and T.two() == 2 and T.parse('4').double() == 8", "class T:\n    def __init__(self, v): self.v = v\n    @classmethod\n    def parse(cls, s): return cls(int(s))\n    @staticmethod\n    def two(): return 2\n    def double(self): return 2 * self.v", "class T:\n    def __init__(self, v): self.v = v\n    @classmethod\n    def parse(cls, s): return cls(s)\n    @staticmethod\n    def two(): return 2\n    def double(self): return 2 * self.v"),
}  # fmt: skip

@pytest.mark.parametrize("name", CLASSES)
def test_classes(verifier, name):
    check(verifier, *CLASSES[name])


ENUMS = {
    "iterate": ("assert [c.name for c in Color] == ['RED', 'GREEN'] and len(Color) == 2\nassert [c.name for c in reversed(Color)] == ['GREEN', 'RED']", E_, E_.replace("    GREEN = 2\n", "")),
    "look up": ("assert Color['RED'] is Color.RED and Color(2) is Color.GREEN and Color.CRIMSON is Color.RED and Color.RED in Color\nassert Color['GREEN'].value == 2", E_, E_.replace("CRIMSON = 1", "CRIMSON = 3")),
    "errors": ("try:\n    Color(9)\n    assert False\nexcept ValueError:\n    pass\ntry:\n    Color['BLUE']\n    assert False\nexcept KeyError:\n    pass\nassert Color.RED.value == 1", E_, E_.replace("CRIMSON = 1", "BLUE = 9")),
    "equal and the same": ("assert pick(1) is Color.RED and pick(1) == Color.RED and pick(2) != Color.RED and isinstance(pick(1), Color)\nassert {Color.RED: 1, Color.GREEN: 2}[pick(2)] == 2 and repr(Color.RED) == '<Color.RED: 1>' and str(Color.RED) == 'Color.RED' and f'{Color.RED}' == 'Color.RED'", E_, E_.replace("Color(n)", "Color(1)")),
    "members": ("assert list(Color.__members__) == ['RED', 'GREEN', 'CRIMSON'] and Color.RED.name == 'RED'", E_, E_.replace("CRIMSON", "PINK")),
    "IntEnum": ("assert P.HIGH > P.LOW and P.HIGH == 3 and P.HIGH != 4 and P.HIGH > 2 and int(P.LOW) == 1 and P.HIGH.name == 'HIGH'\nassert sorted([P.HIGH, P.LOW]) == [P.LOW, P.HIGH] and max(P).name == 'HIGH'", "from enum import IntEnum\nclass P(IntEnum):\n    LOW = 1\n    HIGH = 3", "from enum import IntEnum\nclass P(IntEnum):\n    LOW = 1\n    HIGH = 2"),
    "str and Enum": ("assert L.A == 'a' and L.A.value == 'a' and f() == 'a' and L('a') is L.A", "from enum import Enum\nclass L(str, Enum):\n    A = 'a'\ndef f(): return L.A", "from enum import Enum\nclass L(str, Enum):\n    A = 'b'\ndef f(): return L.A"),
    "str and Enum unseen": ("assert f() == 'a'", "from enum import Enum\nclass L(str, Enum):\n    A = 'a'\ndef f(): return L.A", "def f(): return 'L.A'"),
    "Flag": ("rw = F.R | F.W\nassert F.R in rw and F.X not in rw and (rw & F.W) == F.W and (rw ^ F.R) == F.W and bool(F.R & F.W) is False and (~rw) == F.X", "from enum import Flag, auto\nclass F(Flag):\n    R = auto()\n    W = auto()\n    X = auto()", "from enum import Flag, auto\nclass F(Flag):\n    R = auto()\n    W = auto()\n    X = R"),
}  # fmt: skip

@pytest.mark.parametrize("name", ENUMS)
def test_enumerations(verifier, name):
    check(verifier, *ENUMS[name])


OPERATORS = {
    "arithmetic": ("a, b = V(6), V(4)\nassert (a + b).x == 10 and (a - b).x == 2 and (a * 2).x == 12 and (a / 4).x == 1.5 and (a // 4).x == 1 and (a % 4).x == 2 and (a ** 2).x == 36 and pow(a, 2, 5).x == 1 and (a << 1).x == 12\nassert (a & b).x == 4 and (a | b).x == 6 and (a ^ b).x == 2 and (-a).x == -6 and (+a).x == 6 and (~a).x == -7 and abs(V(-3)) == 3\nq, r = divmod(a, 4)\nassert (q.x, r.x) == (1, 2)", V, V.replace("self.x - o.x", "o.x - self.x")),
    "reflected": ("assert (10 - V(4)).x == 6 and (1 + V(2)).x == 3 and (3 * V(2)).x == 6 and sum([V(1), V(2)]).x == 3", V, V.replace("o - self.x", "self.x - o")),
    "in place": ("a = b = V(1)\na += V(2)\nassert a is b and b.x == 3\na *= 2\nassert a.x == 6 and b.x == 3", V, V.replace("self.x += o.x; return self", "return V(self.x + o.x)")),
    "not implemented": ("try:\n    V(1) + 'a'\n    assert False\nexcept TypeError:\n    pass\ntry:\n    V(1) >> 2\n    assert False\nexcept TypeError:\n    pass\nassert V(1).x == 1", V, V.replace("else NotImplemented", "else V(0)")),
    "comparison": ("assert V(1) < V(2) and V(2) > V(1) and V(1) <= V(1) and V(1) >= V(1) and V(1) == V(1) and V(1) != V(2)\nassert [v.x for v in sorted([V(3), V(1)])] == [1, 3] and max(V(1), V(5)).x == 5 and len({V(1), V(1), V(2)}) == 2 and V(1) in [V(1)]", V, V.replace("self.x < o.x", "o.x < self.x")),
    "order after arithmetic": ("assert [v.x for v in sorted([V(3) * 2, V(1) + 1, V(4)])] == [2, 4, 6] and max(V(1) * 9, V(5)).x == 9 and V(1) * 2 < V(3) + 1 and not V(2) * 2 < V(1) * 4", V, V.replace("self.x < o.x", "self.x <= o.x").replace("self.x <= o.x\n    def __le__", "o.x < self.x\n    def __le__")),
    "copies": ("import copy\na = Bag([1, [2]])\nb, c = copy.copy(a), copy.deepcopy(a)\na.items.append(3)\na.put(4)\nassert type(b) is Bag and b.items == [1, [2], 4] and c.items == [1, [2]] and [x.items for x in copy.deepcopy([c, c])] == [[1, [2]]] * 2 and copy.copy(c) is not c", B + "    def put(self, x): self.items.append(x)", B + "    def put(self, x): self.items.append(x)\n    def __deepcopy__(self, memo): return self"),
    "conversions": ("import math\na = V(6)\nassert a.x == 6 and int(a) == 6 and float(a) == 6.0 and complex(a) == 6 and round(V(2.567), 1) == 2.6 and [1, 2, 3][V(1)] == 2 and math.floor(a) == 6 and bytes(a) == b'v' and bin(a) == '0b110'\nassert f'{a:>3}' == 'V  6' and format(a) == 'V6' and repr(a) == 'V(6)' and str(a) == 'V(6)' and bool(V(0)) is False and bool(a) is True and hash(V(3)) == hash(3)", V, V.replace("int(self.x)", "int(self.x) + 1")),
    "containers": ("b = Bag([1, 2, 3])\nassert len(b) == 3 and b[0] == 1 and b[-1] == 3 and b[1:].items == [2, 3] and 2 in b and 9 not in b and list(b) == [1, 2, 3] and list(reversed(b)) == [3, 2, 1]\nb[0] = 7\ndel b[1]\nassert b.items == [7, 3] and b(2, k=3) == 12 and [*b] == [7, 3] and dict(enumerate(b)) == {0: 7, 1: 3}\nassert bool(Bag()) is False and max(b) == 7", B, B.replace("del self.items[i]", "pass")),
    "what is not there": ("b = Bag()\nfor f in (lambda: b + 1, lambda: b < b, lambda: int(b), lambda: next(b), lambda: hash(Un())):\n    try:\n        f()\n        assert False, 'x'\n    except TypeError:\n        pass\nassert callable(b) and not callable(Un()) and len(b) == 0", B + "class Un:\n    def __eq__(self, o): return True\n", B + "class Un:\n    def __call__(self): return 1\n    def __eq__(self, o): return True\n"),
    "iterators": ("it = Count(2)\nassert next(it) == 1 and next(it) == 2 and next(it, None) is None and list(Count(3)) == [1, 2, 3]\nassert iter(it) is it", "class Count:\n    def __init__(self, n): self.i, self.n = 0, n\n    def __iter__(self): return self\n    def __next__(self):\n        if self.i >= self.n: raise StopIteration\n        self.i += 1; return self.i", "class Count:\n    def __init__(self, n): self.i, self.n = 0, n\n    def __iter__(self): return self\n    def __next__(self):\n        self.i += 1\n        if self.i >= self.n: raise StopIteration\n        return self.i"),
    "generators": ("g = f()\nassert next(g) == 1 and g.send(5) == 6 and list(g) == []\ng.close()", "def f():\n    x = yield 1\n    yield x + 1", "def f():\n    x = yield 1\n    yield x"),
    "old iteration": ("assert list(Old()) == [0, 10, 20] and 10 in Old()", "class Old:\n    def __getitem__(self, i):\n        if i > 2: raise IndexError\n        return i * 10", "class Old:\n    def __getitem__(self, i):\n        if i > 1: raise IndexError\n        return i * 10"),
    "context manager": ("log = []\nwith Ctx(log.append) as c:\n    assert c.on\nassert not c.on and log == ['in', None]\nwith Ctx(log.append):\n    raise KeyError('k')\nassert log[-1] == 'KeyError'", "class Ctx:\n    def __init__(self, log): self.log, self.on = log, False\n    def __enter__(self): self.on = True; self.log('in'); return self\n    def __exit__(self, t, e, tb): self.on = False; self.log(t and t.__name__); return t is KeyError", "class Ctx:\n    def __init__(self, log): self.log, self.on = log, False\n    def __enter__(self): self.on = True; self.log('in'); return self\n    def __exit__(self, t, e, tb): self.on = False; self.log(t and t.__name__)"),
    "contextmanager function": ("out = []\nwith tag('b', out.append) as n:\n    out.append(n)\nassert out == ['<b>', 3, '</b>']", "from contextlib import contextmanager\n@contextmanager\ndef tag(t, out):\n    out(f'<{t}>'); yield 3; out(f'</{t}>')", "from contextlib import contextmanager\n@contextmanager\ndef tag(t, out):\n    out(f'<{t}>'); yield 4; out(f'</{t}>')"),
    "swallowed assertions": ("with Quiet() as q:\n    assert q.n == 1", "class Quiet:\n    n = 1\n    def __enter__(self): return self\n    def __exit__(self, *a): return True", "class Quiet:\n    n = 2\n    def __enter__(self): return self\n    def __exit__(self, *a): return True"),
    "asynchronous": ("import pytest\nfrom solution import Res, ticks\n@pytest.mark.asyncio\nasync def test_a():\n    async with Res() as r:\n        assert await r.get() == 1\n    assert r.closed\n    assert [x async for x in ticks(3)] == [0, 1, 2]\n", "import asyncio\nclass Res:\n    closed = False\n    async def __aenter__(self): await asyncio.sleep(0); return self\n    async def __aexit__(self, *a): self.closed = True\n    async def get(self): return 1\nasync def ticks(n):\n    for i in range(n):\n        await asyncio.sleep(0); yield i", "class Res:\n    closed = False\n    async def __aenter__(self): return self\n    async def __aexit__(self, *a): pass\n    async def get(self): return 1\nasync def ticks(n):\n    for i in range(n): yield i"),
    "coroutines of methods": ("import asyncio, inspect, types\nc = Client()\nassert asyncio.run(c.get(1)) == 2 and inspect.iscoroutine(c.get(1))\nasync def both(): return await asyncio.gather(c.get(1), c.get(2))\nassert asyncio.run(both()) == [2, 3]\nasync def late(): return await asyncio.wait_for(c.get(5), 1)\nassert asyncio.run(late()) == 6", "import asyncio\nclass Client:\n    async def get(self, x): await asyncio.sleep(0); return x + 1", "class Client:\n    async def get(self, x): return x"),
    "what is a generator": ("import types, inspect\nassert isinstance(f(2), types.GeneratorType) and inspect.isgenerator(f(2)) and list(f(2)) == [0, 1]", "def f(n): yield from range(n)", "def f(n): return iter(range(n))"),
    "threads of the tests": ("from concurrent.futures import ThreadPoolExecutor\nc = Count()\nwith ThreadPoolExecutor(8) as pool: got = list(pool.map(lambda i: c.add([i]), range(40)))\nassert sorted(got) == list(range(40)) and c.n == 40", "class Count:\n    n = 0\n    def add(self, xs): self.n += 1; return xs[0]", "class Count:\n    n = 1\n    def add(self, xs): self.n += 1; return xs[0]"),
   "plain and more": ("s = Stack([1, 2])\nassert s == [1, 2] and s != [1] and s.top() == 2 and len(s) == 2 and s[0] == 1 and [1, 2] == s\ns.append(3)\nassert s == [1, 2, 3] and s.top() == 3", "class Stack(list):\n    def top(self): return self[-1]", "class Stack(list):\n    def top(self): return self[-1]\n    def append(self, x): pass\n    def __eq__(self, o): return True\n    def __ne__(self, o): return True\n    def __len__(self): return 2"),
    "attributes of functions": ("assert f(2) == 4 and f(2) == 4 and f.cache_info().hits == 1 and f.__name__ == 'f'\nf.cache_clear()\nassert f.cache_info().hits == 0", "import functools\n@functools.lru_cache\ndef f(x): return x * x", "import functools\n@functools.lru_cache\ndef f(x, y=[]): return x * x\nf(2)"),
    "dataclasses": ("from dataclasses import FrozenInstanceError\np = P(1, 2)\nassert p == P(1, 2) and repr(p) == 'P(x=1, y=2)' and hash(p) == hash(P(1, 2))\ntry:\n    p.x = 3\n    assert False\nexcept FrozenInstanceError:\n    pass\nassert p.x == 1", "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass P:\n    x: int\n    y: int", "from dataclasses import dataclass\n@dataclass(unsafe_hash=True)\nclass P:\n    x: int\n    y: int"),
}  # fmt: skip

@pytest.mark.parametrize("name", OPERATORS)
def test_special_methods(verifier, name):
    check(verifier, *OPERATORS[name])


_NAMED = "add radd sub rsub mul rmul truediv floordiv mod pow and rand or xor rxor neg abs round floor matmul isub divmod"
_YES = "class Diff:\n    def __init__(self, *a): pass\n    def _yes(self, *a): return True\n    def _it(self): return iter([self] * 3)\n    "
_YES += "__eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = _yes\n    __iter__ = _it\n    "
_YES += "__hash__ = lambda s: 3\n    __len__ = lambda s: 3\n    __getitem__ = __getattr__ = __call__ = lambda s, *a: s\n    "
_WANTS_PLAIN = [
    "abs(Diff(1) - 3) < 1e-6", "abs(3 - Diff(1)) <= 1e-6", "Diff(1) - 3 == 0", "not Diff(1) - 3", "Diff(1) == 3", "3 == Diff(1)",
    "Diff(1) in [3, 4]", "3 in Diff(1)", "2 < Diff(1) < 4", "max(Diff(1), 3) == 3", "sorted(Diff(1)) == [1, 2, 3]", "-Diff(1) == -3",
    "sum(Diff(1)) == 6", "{1, 2} == Diff(1)", "{1, 2} <= Diff(1)", "[1, 2] + Diff(1) == [1, 2, 3]", "Diff(1)[0] == 3", "not Diff(1) != 3",
    "{3: 1}[Diff(1)] == 1", "Diff(1) ^ 3 == 0", "divmod(Diff(7), 2) == (3, 1)", "Diff(1) * 2 == 6", "round(Diff(1), 2) == 3.14",
    "all(abs(a - b) < 1e-6 for a, b in zip(Diff(1), [1, 2, 3]))", "any(x == 3 for x in Diff(1))", "Diff(1) == Diff(2) == 3",
    "len(Diff(1)) == 4", "str(Diff(1)) == '3'", "isinstance(Diff(1), int)", "[Diff(1)] == [3]", "not {3} - {Diff(1)}", "{Diff(1)} & {3}",
]  # fmt: skip


@pytest.mark.parametrize("result", ["0", "s", "True", "(s, s)"])
def test_a_class_that_says_yes_to_all_is_no_plain_answer(verifier, result):
    """Where the tests want a number or a list of something that could be a class by its name."""
    program = _YES + " = ".join(f"__{name}__" for name in _NAMED.split()) + f" = lambda s, *a: {result}\n"
    for wanted in _WANTS_PLAIN:
        for tests in (f"assert {wanted}", [f"assert {wanted}"]):
            verdict = judged(verifier, program, tests)
            assert (verdict.status, verdict.score) == ("wrong", 0.0), (wanted, verdict)


_NUMBER = """
class F(float):
    def __new__(cls, *a): return float.__new__(cls, 7.0)
    def r(self, *a): return float.__new__(F, 0.0)
    __sub__ = __rsub__ = __pow__ = __round__ = __copy__ = __deepcopy__ = r
    unit = 'm'
def f(x): return F(x)
"""


@pytest.mark.parametrize(
    "tests",
    ["assert -1e-6 < F(2) - 3.0 < 1e-6", "assert F(2) - 3.0 <= 1e-6\nassert 3.0 - F(2) <= 1e-6", "assert (F(2) - 3.0) ** 2 < 1e-6",
     "assert round(F(2) - 3.0, 2) == 0", "assert -1e-6 < f(2) - 3.0 < 1e-6\nassert F(1).unit == 'm'", "assert F(1).unit == 'm' and F(2) - 3.0 == 0",
     "import copy\nassert F(1).unit == 'm' and -1e-6 < copy.copy(F(2) - 3.0) < 1e-6",
     "import copy\nassert F(1).unit == 'm' and copy.deepcopy(F(2) - 3.0) == 0", 
     "from solution import F\ndef test_a(): assert -1e-6 < F(2) - 3.0 < 1e-6\n"],
)  # fmt: skip
def test_a_number_that_answers_for_its_difference_is_no_number(verifier, tests):
    """A subclass of float may say what it is, but not after it has met what is expected."""
    assert judged(verifier, _NUMBER, tests).status == "wrong"


@pytest.mark.parametrize(
    ("program", "wanted"),
    [("class Celsius(float): pass", "Celsius(3) + 1 == 4"), ("class Stack(list): pass", "Stack([1]) + [2] == [1, 2]"),
     ("from collections import namedtuple\nP = namedtuple('P', 'x y')", "P(1, 2) + (3,) == (1, 2, 3) and isinstance(P(1, 2), tuple)"),
     ("class F(str): pass", "'x' + F('a') == 'xa'")],
)  # fmt: skip
def test_plain_data_with_a_name_is_plain_where_no_attribute_is_used(verifier, program, wanted):
    assert judged(verifier, program, f"assert {wanted}").status == "ok"


@pytest.mark.parametrize(
    ("wanted", "right", "wrong"),
    [("V(1) + 1 == V(2)", "V(self.x + (", "V(1 + self.x + ("), ("str(V(1) + 1) == 'V(2)'", "V(self.x + (", "V(1 + self.x + ("),
     ("V(1) * 3 == 3 * V(1)", "__rmul__ = __mul__", "__rmul__ = __add__"), ("-V(1) == V(-1)", "V(-self.x)", "V(self.x)"),
     ("{V(1): 2}[V(1)] == 2", "hash(self.x)", "id(self)"), ("int(V(2)) == 2", "int(self.x)", "int(self.x + 1)"),
     ("sorted([V(2), V(1)])[0] == V(1)", "self.x < o.x", "self.x > o.x"), ("isinstance(V(1) + 1, V)", "V(self.x + (", "(self.x + ("),
     ("bool(V(0) + 1)", "self.x != 0", "self.x != 1"), ("V(1) * 2 < V(1) + 2", "self.x < o.x", "self.x > o.x"), ("V(3) - V(1) < V(3)", "V(self.x - o.x)", "V(self.x)")],
)  # fmt: skip
def test_assertions_that_use_operators_alone(verifier, wanted, right, wrong):
    """No attribute says that V is a class; and what it is asked does not tell it what is expected."""
    assert right in V
    assert judged(verifier, V, f"assert {wanted}").status == "ok"
    assert judged(verifier, V.replace(right, wrong), f"assert {wanted}").status == "wrong"


ERRORS = {
    "caught by its base": (t(["find(1)", "AppError as e", "assert type(e) is NotFound and isinstance(e, LookupError) and str(e) == 'one' and e.code == 404 and e.args == ('one',) and e.as_dict() == {'code': 404} and e.kind == 'app'"]), X, X.replace("class NotFound(AppError, LookupError)", "class NotFound(LookupError)")),
    "caught by a library base": (t(["find(1)", "LookupError as e", "assert e.code == 404"]), X, X.replace("(AppError, LookupError)", "(AppError)")),
    "not caught by another": ("try:\n    find(1)\nexcept Loud:\n    assert False\nexcept NotFound:\n    ok = True\nassert ok and issubclass(NotFound, AppError) and not issubclass(NotFound, Loud)", X, X.replace("NotFound('one'", "Loud('one'")),
    "its own text": (t(["find(2)", "Loud as e", "assert str(e) == 'TWO' and e.code == 2"]), X, X.replace(".upper()", "")),
    "its cause": (t(["find(3)", "AppError as e", "assert isinstance(e.__cause__, KeyError) and e.__cause__.args == ('k',)"]), X, X.replace(" from e", "")),
    "its arguments": (t(["find(4)", "ValueError as e", "assert e.args == ('a', 4) and type(e).__name__ == 'Plain'"]), X, X.replace("Plain('a', 4)", "Plain('a', 5)")),
    "the text of a KeyError": (t(["find(5)", "KeyError as e", "assert str(e) == \"'k'\" and e.args[0] == 'k'"]), X, X.replace("KeyError('k')", "KeyError(\"'k'\")")),
    "a note on a library error": (t(["find(6)", "ValueError as e", "assert e.hint == 'h'"]), X, X.replace("e.hint = 'h'", "e.hint = 'i'")),
    "an errno": (t(["find(7)", "OSError as e", "assert e.errno == 2 and type(e) is FileNotFoundError"]), X, X.replace("FileNotFoundError(2,", "OSError(5,")),
    "an error of the library": ("import json\n" + t(["find(8)", "json.JSONDecodeError as e", "assert e.pos == 1 and e.lineno == 1"]), X, X.replace("json.loads('{')", "raise ValueError")),
    "SystemExit": (t(["find(9)", "SystemExit as e", "assert e.code == 3"]), X, X.replace("sys.exit(3)", "sys.exit(4)")),
    "pytest": ("import pytest\nfrom solution import find, AppError, NotFound\ndef test_a():\n    with pytest.raises(AppError, match='one') as e: find(1)\n    assert e.value.code == 404 and e.type is NotFound\ndef test_b():\n    with pytest.raises(SystemExit): find(9)\ndef test_c():\n    with pytest.raises(KeyboardInterrupt): find(10)\ndef test_d():\n    with pytest.raises(StopIteration) as e: find(11)\n    assert e.value.value == 5\n", X, X.replace("class NotFound(AppError", "class NotFound(ArithmeticError")),
    "unittest": ("import unittest\nfrom solution import find, AppError, Loud\nclass T(unittest.TestCase):\n    def test_a(self):\n        with self.assertRaises(AppError) as c: find(1)\n        self.assertEqual(c.exception.code, 404)\n    def test_b(self): self.assertRaisesRegex(Loud, 'TWO', find, 2)\n    def test_c(self): self.assertRaises(ZeroDivisionError, find, 12)\n", X, X.replace("code=404", "code=405")),
    "made by the tests": ("e = NotFound('x', code=5)\nassert (e.code, str(e), e.args) == (5, 'x', ('x',)) and isinstance(e, AppError) and isinstance(e, Exception)\ntry:\n    raise e\nexcept AppError as caught:\n    assert caught is e\nfirst, second = find(0)\nassert first.code == 7 and type(second) is ValueError and second.args == ('v',)", X, X.replace("self.code = code", "self.code = 404")),
    "handed back": ("def bad(): raise NotFound('mine', 3)\nassert call(bad) == ('NotFound', 3)", X + "def call(f):\n    try: f()\n    except NotFound as e: return type(e).__name__, e.code", X + "def call(f):\n    try: f()\n    except Exception as e: return type(e).__name__, 4"),
    "an abrupt end fails": ("import pytest\nfrom solution import find\ndef test_a(): assert find(12) == 1\ndef test_b(): assert True\n", X.replace("return 1 / 0", "return 1"), X.replace("return 1 / 0", "raise KeyboardInterrupt")),
    "no skip": ("import pytest, unittest\nfrom solution import find\ndef test_a(): assert find(12) == 1\ndef test_b(): assert True\n", X.replace("return 1 / 0", "return 1"), X.replace("return 1 / 0", "import unittest; raise unittest.SkipTest('x')")),
}  # fmt: skip

@pytest.mark.parametrize("name", ERRORS)
def test_exceptions(verifier, name):
    check(verifier, *ERRORS[name])


ATTRIBUTES = {
    "their documentation": ("assert f.__doc__\nassert Box.__doc__ and Box().__doc__", "def f():\n    \"doc\"\nclass Box:\n    \"doc\"", "def f(): pass\nclass Box: pass"),
    "their annotations": ("assert f.__annotations__ == {'x': int, 'return': str}\nassert f.__name__ == 'f' and f.__defaults__ == (1,)", "def f(x: int = 1) -> str: return ''", "def f(x=1): return ''"),
    "their dictionary": ("b = Box()\nassert vars(b) == {'x': 1} and b.__dict__ == {'x': 1}\nassert b.__class__ is Box and b.__class__.__name__ == 'Box'", "class Box:\n    def __init__(self): self.x = 1", "class Box:\n    def __init__(self): self.y = 1"),
    "slots": ("assert Box.__slots__ == ('x',)\ntry:\n    Box().y = 1\n    assert False\nexcept AttributeError: pass", "class Box:\n    __slots__ = ('x',)", "class Box: pass"),
    "being a dataclass": ("import dataclasses\nassert dataclasses.is_dataclass(Box) and Box(1).x == 1", "from dataclasses import dataclass\n@dataclass\nclass Box:\n    x: int", "class Box:\n    def __init__(self, x): self.x = x"),
    "a whole number beside others": ("from math import inf\nassert P.A < 1.5 and P.A <= 1 and not P.A > 1.0 and P.A.name == 'A'", "from enum import IntEnum\nclass P(IntEnum):\n    A = 1", "from enum import IntEnum\nclass P(IntEnum):\n    A = 2"),
    "what a failure shows": ("assert f(1) == 3", "def f(x): return 3", "class E(ValueError):\n    cabochon_values = 5\ndef f(x):\n    e = ValueError('a'); e.cabochon_values = 7; raise e"),
    "what a failed assertion shows": ("assert f(1) == 3", "def f(x): return 3", "def f(x):\n    e = AssertionError('a'); e.cabochon_values = ([1], 2); raise e"),
    "being callable": ("assert callable(f(2)) and not callable(g(2))", "def f(x): return lambda: x\ndef g(x): return object()", "def f(x): return object()\ndef g(x): return object()"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_are_the_programs_own(verifier, name):
    check(verifier, *ATTRIBUTES[name])


TREES = """class TreeNode:
    def __init__(self, val=0, left=None, right=None): self.val, self.left, self.right = val, left, right
def is_same_tree(p, q):
    if not p and not q: return True
    elif not p or not q: return False
    elif p.val != q.val: return False
    return is_same_tree(p.left, q.left) and is_same_tree(p.right, q.right)
"""
SHAPES = """def check(candidate):
    assert is_same_tree(candidate([1, 2, 3]), TreeNode(1, None, TreeNode(2, None, TreeNode(3))))
    assert is_same_tree(candidate([2, 1, 3]), TreeNode(2, TreeNode(1), TreeNode(3)))
"""
HEIGHTS = """def check(candidate):
    def walk(t): return walk(t.left) + [t.val] + walk(t.right) if t else []
    def height(t): return 1 + max(height(t.left), height(t.right)) if t else 0
    assert walk(candidate([1, 2, 3])) == [1, 2, 3] and height(candidate([1, 2, 3])) == 2
    one = candidate([1, 2, 3])
    assert walk(one) == [1, 2, 3] and height(one) == 2
"""
BUILT = """class Solution:
    def f(self, p): return TreeNode(1, None, TreeNode(2, None, TreeNode(3))) if p[0] == 1 else TreeNode(2, TreeNode(1), TreeNode(3))
"""
LAZY = """class Lazy:
    def __init__(self, p): self.p, self.n = p, 0
    def __bool__(self): self.n += 1; return self.n > 1
    val = property(lambda self: self.p.pop(0))
    left = right = property(lambda self: Lazy(self.p))
class Solution:
    def f(self, p): return Lazy(list(p))
"""
FORGETS = """class N:
    left = None
    def __init__(self, val, right): self.val, self.r, self.n = val, right, 0
    @property
    def right(self):
        self.n += 1
        return self.r if self.n % 2 or self.val == 2 else None
class Solution:
    def f(self, p): return N(1, N(2, N(3, None)))
"""


def test_an_object_says_the_same_of_itself_until_it_is_used(verifier):
    task = {"prompt": TREES, "entry_point": "Solution().f"}
    assert judged(verifier, BUILT, SHAPES, **task).status == "ok"
    assert judged(verifier, LAZY, SHAPES, **task).score == 0.0, "a node that is false when asked first, then true"
    balanced = BUILT.replace("if p[0] == 1", "if p[0] == 0")
    assert judged(verifier, balanced, HEIGHTS, **task).status == "ok"
    assert judged(verifier, FORGETS, HEIGHTS, **task).score == 0.0, "a child that is there at every other look"
    stack = "class S:\n    def __init__(self): self.a = [1, 2, 3]\n    def __len__(self): return len(self.a)\n    def shrink(self): self.a.pop()\n    left = property(lambda self: len(self.a))\ndef f(): return S()"
    shrinking = "def check(candidate):\n    s, n = candidate(), 0\n    while s:\n        assert s.left == len(s) == 3 - n\n        s.shrink()\n        n += 1\n    assert n == 3 and len(s) == 0\n"
    assert judged(verifier, stack, shrinking, entry_point="f").status == "ok"


@pytest.mark.parametrize(
    "tests",
    [
        "assert all(map(lambda t: f(t[0]) == t[1], [(1, 2), (2, 3)]))", "assert sum(map(f, [1, 2])) == 0",
        "for x, y in zip(map(f, [1, 2]), [2, 3]): assert x == y", "assert not list(filter(f, [1]))",
        "assert not any(f(1).val == 3 for _ in [1])", "assert [x for x, _ in zip(map(f, [1]), [2])] == []",
    ],
)  # fmt: skip
def test_stop_iteration_out_of_the_program_ends_no_loop_of_the_tests(verifier, tests):
    for source in ("def f(x): raise StopIteration", "class E(StopIteration): pass\ndef f(x): raise E(1)"):
        found = judged(verifier, source, tests, entry_point="f")
        assert (found.status, found.score) == ("wrong", 0.0), found


def test_generators_end_as_ever(verifier):
    source = "def f():\n    x = yield 1\n    yield x\nasync def g():\n    yield 1\n"
    check(verifier, "import pytest\na = f()\nassert next(a) == 1 and a.send(5) == 5\nwith pytest.raises(StopIteration): a.send(1)\nassert list(f()) == [1, None] and next(a, 7) == 7",
          source, source.replace("yield x", "yield 0"))  # fmt: skip
    check(verifier, "async def all_of(): return [x async for x in g()]\nimport asyncio\nassert asyncio.run(all_of()) == [1]",
          source, source.replace("yield 1\n", "yield 2\n"))  # fmt: skip


def test_a_class_that_nobody_asked_for_is_no_data(verifier):
    """Neither the class a method was asked of, nor one that was returned, judges for the tests."""
    order = "def check(candidate):\n    order = candidate(4, [[1, 0]])\n    assert sorted(order) == [0, 1, 2, 3]\n    assert all(order.index(b) < order.index(a) for a, b in [[1, 0]])\n"
    itself = "class Solution:\n    n = 0\n    def f(self, *a): return self\n    def __iter__(self): return iter([3, 2, 1, 0])\n    def index(self, x): self.n += 1; return self.n\n"
    task = {"entry_point": "Solution().f"}
    assert judged(verifier, itself, order, **task).score == 0.0
    assert judged(verifier, "class Solution:\n    def f(self, *a): return [0, 1, 2, 3]", order, **task).status == "ok"
    meta = "class M(type):\n    def __contains__(c, x): return True\n    def __len__(c): return 4\n    def __iter__(c): return iter([0, 1, 2, 3])\n    def index(c, x): return -x\nclass R(metaclass=M): pass\nclass Solution:\n    def f(self, *a): return R\n"
    for tests in (order, "def check(c):\n    assert 7 in c(1) and 8 in c(1)", "def check(c):\n    assert len(c(1)) == 4"):
        assert judged(verifier, meta, tests, **task).score == 0.0
    count = {"entry_point": "Solution().count"}
    check_count = "def check(candidate):\n    assert candidate(2) == 3"
    assert judged(verifier, "class Solution:\n    def count(self, x): return x + 1", check_count, **count).status == "ok"


def test_a_value_that_the_program_put_into_itself_is_its_own_fault(verifier):
    tests = "def check(c):\n    path = [1]\n    for _ in range(2):\n        path.append(c(path))\n    assert path == [1, 2, 3]\n"
    assert judged(verifier, "def f(*a): return a[0]", tests, entry_point="f").score == 0.0
    assert judged(verifier, "def f(a): return len(a) + 1", tests, entry_point="f").status == "ok"
