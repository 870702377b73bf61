"""Digests of UDFs' code: other code has another one, the same code the same in every process."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import types
from typing import Any

import pytest

from ray_resume.core.code import Code
from ray_resume.core.code_digest import digest_of_code
from ray_resume.core.records import pipeline_hash
from ray_resume.udf.decorator import resumable

MODULE = """
import collections, dataclasses, datetime, enum, functools, re, threading

LIMIT = 1
WORDS = re.compile('abc+', re.DOTALL)

def other(x):
    return x

def helper(x):
    return x + LIMIT

def wrapping(times):
    def decorate(f):
        @functools.wraps(f)
        def wrapper(x):
            return f(x) * times
        return wrapper
    return decorate

def plain(x):
    return x % 7

def holding(held):
    return lambda x: held

class Base:
    def base(self, x):
        return x ** 2

class Tool(Base):
    factor = 2
    def __init__(self, start=0, then=None):
        self.start, self.then, self.lock = start, then, threading.Lock()
    def method(self, x):
        return self.called(x)
    def called(self, x):
        return helper(x) + self.start
    @property
    def size(self):
        return 11
    @staticmethod
    def static(x):
        return x - 5
    @classmethod
    def of(cls, x):
        return cls(x + 6)

class Slotted:
    __slots__ = ("a", "b")
    def __init__(self, a):
        self.a = a
    def __call__(self, x):
        return x + self.a

class Kind(enum.Enum):
    ONE = 1
    TWO = 2

@dataclasses.dataclass(frozen=True)
class Settings:
    heat: float = 0.5
    then: object = None
    day: object = datetime.date(2026, 1, 1)

class Words(dict):
    pass

class Day(datetime.datetime):
    pass

class Loop:
    def __init__(self, x):
        self.me, self.x, self.around = self, x, {"me": [self]}
        self.callback = self.again
    def again(self, x):
        return x + self.x

def even(x):
    return x == 0 or odd(x - 1)

def odd(x):
    return x != 0 and even(x - 1)

OURS = [helper, {"plain": plain}]
SETTINGS = Settings()
"""

# By what is changed: the UDF, and text that is replaced in it or in the module.
CHANGES: dict[str, tuple[str, str, str]] = {
    "a regular expression": ("udf = lambda x: WORDS.search(x)", "abc+", "abc*"),
    "its flags": ("udf = functools.partial(WORDS.sub, '')", "re.DOTALL", "re.ASCII"),
    "a wrapper": ("udf = wrapping(2)(other)", "f(x) * times", "f(x) + times"),
    "what a wrapper wraps": ("udf = wrapping(2)(plain)", "% 7", "% 8"),
    "the argument of a wrapper": ("udf = wrapping(2)(other)", "(2)", "(3)"),
    "the inner one of two wrappers": ("udf = wrapping(2)(wrapping(3)(other))", "(3)", "(4)"),
    "a wrapper within functools": ("udf = functools.lru_cache(plain)", "% 7", "% 8"),
    "the function of singledispatch": ("udf = functools.singledispatch(plain)", "% 7", "% 8"),
    "a helper's wrapper": (
        "wrapped = wrapping(2)(other)\nudf = lambda x: wrapped(x)",
        "f(x) * times",
        "f(x) + times",
    ),
    "a bound method": ("udf = Tool().method", "return self.called(x)", "return self.called(-x)"),
    "a method that it calls": ("udf = Tool().method", "+ self.start", "- self.start"),
    "a function that it calls": ("udf = Tool().method", "x + LIMIT", "x - LIMIT"),
    "a value that this names": ("udf = Tool().method", "LIMIT = 1", "LIMIT = 2"),
    "a property": ("udf = Tool().method", "return 11", "return 12"),
    "a static method": ("udf = Tool().method", "x - 5", "x - 6"),
    "a class method": ("udf = Tool().method", "x + 6", "x + 7"),
    "a method below": ("udf = Tool().method", "x ** 2", "x ** 3"),
    "an inherited bound method": ("udf = Tool().base", "x ** 2", "x ** 3"),
    "a bound class method": ("udf = Tool.of", "x + 6", "x + 7"),
    "a value of a class": ("udf = Tool().method", "factor = 2", "factor = 3"),
    "an attribute": ("udf = Tool(1).method", "Tool(1)", "Tool(2)"),
    "a function in an attribute": ("udf = Tool(then=plain).method", "% 7", "% 8"),
    "functions in an attribute": ("udf = Tool(then=[(plain,)]).method", "% 7", "% 8"),
    "an object in an attribute": (
        "udf = Tool(then=Tool(then=(4,))).method",
        "then=(4,)",
        "then=(5,)",
    ),
    "a slot": ("udf = Slotted(1)", "Slotted(1)", "Slotted(2)"),
    "a method of an object": ("tool = Tool()\nudf = lambda x: tool.method(x)", "x - 5", "x - 6"),
    "a method in a closure": ("udf = holding(Tool(1).method)", "Tool(1)", "Tool(2)"),
    "a tuple in a closure": ("udf = holding((plain, 1))", "% 7", "% 8"),
    "a dict in a closure": ("udf = holding({'f': plain})", "% 7", "% 8"),
    "a set in a closure": ("udf = holding({plain, other})", "% 7", "% 8"),
    "a deque in a closure": ("udf = holding(collections.deque([plain]))", "% 7", "% 8"),
    "a partial in a closure": ("udf = holding(functools.partial(plain, 1))", "% 7", "% 8"),
    "a class in a closure": ("udf = holding([Tool])", "x - 5", "x - 6"),
    "a method of a text in a closure": ("udf = holding(', '.join)", "', '", "'; '"),
    "a set among the constants": ("udf = lambda x: x in {'a', 'b', 'c'}", "'c'", "'d'"),
    "an enumeration": ("udf = holding(Kind.ONE)", "Kind.ONE", "Kind.TWO"),
    "a dataclass": ("udf = holding([SETTINGS])", "Settings()", "Settings(0.7)"),
    "a function in a dataclass": ("udf = holding(Settings(then=plain))", "% 7", "% 8"),
    "a dict of a class": ("udf = holding(Words(a=1))", "Words(a=1)", "Words(a=2)"),
    "a date of a class": ("udf = holding(Day(2026, 1, 2))", "2026, 1, 2", "2026, 1, 3"),
    "a list of the module": ("udf = lambda x: OURS[0](x)", "% 7", "% 8"),
    "a default": ("def udf(x, f=(plain,)): pass", "% 7", "% 8"),
    "a default by name": ("def udf(x, *, f={'p': [plain]}): pass", "% 7", "% 8"),
    "an argument of partial": ("udf = functools.partial(other, [plain])", "% 7", "% 8"),
    "which name a function has": (
        "udf = holding({'a': plain, 'b': other})",
        "'a': plain, 'b': other",
        "'a': other, 'b': plain",
    ),
    "an order": ("udf = holding([plain, other])", "[plain, other]", "[other, plain]"),
    "a handler of errors": (
        "def udf(x):\n try: x(1); x(2)\n except E: pass",
        "try: x(1); x(2)",
        "x(1)\n try: x(2)",
    ),
    "how a parameter is given": ("def udf(x, y): pass", "x, y", "x, *, y"),
    "one of two that call each other": ("udf = even", "x != 0", "x == 0"),
    "an object that holds itself": ("udf = holding(Loop(1))", "x + self.x", "x - self.x"),
    "a method that its object holds": ("udf = Loop(1).again", "Loop(1)", "Loop(2)"),
}

# Two ways to write the same, as far as a digest should see.
ALIKE: dict[str, tuple[str, str]] = {
    "the order of a dict": (
        "udf = holding({'a': plain, 'b': other})",
        "udf = holding({'b': other, 'a': plain})",
    ),
    "the order of a set": (
        "udf = holding({plain, other, even, odd, 'a', 'b'})",
        "udf = holding({'b', odd, even, 'a', other, plain})",
    ),
    "the order of functions as keys": (
        "udf = holding({plain: 1, other: [odd], even: 3, odd: 4})",
        "udf = holding({odd: 4, other: [odd], plain: 1, even: 3})",
    ),
    "the order of attributes": (
        "udf = Tool().method\nudf.__self__.__dict__.update(a=1, b=2)",
        "udf = Tool().method\nudf.__self__.__dict__.update(b=2, a=1)",
    ),
    "the identity of objects": ("udf = holding(object())", "udf = holding(object())"),
    "a secret": ("def udf(x, api_key='a'): pass", "def udf(x, api_key='b'): pass"),
    "where it stands": ("udf = lambda x: helper(x)", "\n\n# Why.\nudf = lambda x: helper(x)"),
    "the names of variables elsewhere": ("udf = helper", "unused = 1\nudf = helper"),
}


def udf_of(source: str) -> Any:
    module = types.ModuleType("own")
    exec(compile(source, "own.py", "exec", dont_inherit=True), module.__dict__)
    return module.udf


def digests() -> dict[str, str]:
    """Return a digest for each case, computed here."""
    cases = {name: udf for name, (udf, _, _) in CHANGES.items()}
    cases |= {name: udf for name, (udf, _) in ALIKE.items()}
    return {name: digest_of_code(udf_of(f"{MODULE}\n{udf}")) for name, udf in cases.items()}


@pytest.mark.parametrize("name", CHANGES)
def test_other_code_has_another_digest(name: str) -> None:
    udf, old, new = CHANGES[name]
    source = f"{MODULE}\n{udf}"
    changed = source.replace(old, new)
    assert changed != source
    before = digest_of_code(udf_of(source))
    assert digest_of_code(udf_of(source)) == before
    assert digest_of_code(resumable(udf_of(source))) == before
    assert digest_of_code(udf_of(changed)) != before


@pytest.mark.parametrize("name", ALIKE)
def test_the_same_code_has_the_same_digest(name: str) -> None:
    one, other = (digest_of_code(udf_of(f"{MODULE}\n{udf}")) for udf in ALIKE[name])
    assert one == other


def test_digests_are_the_same_in_every_process() -> None:
    script = "import json, test_code; print(json.dumps(test_code.digests()))"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    for seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
        assert json.loads(result.stdout) == digests()


def test_libraries_are_covered_by_their_names() -> None:
    """A new version of a library is no other code of the user's."""

    def digest(library: str) -> str:
        module = types.ModuleType("library")
        exec(compile(library, "library.py", "exec", dont_inherit=True), module.__dict__)
        own = types.ModuleType("own")
        own.__dict__.update(lib=module, helper=module.helper, Tool=module.Tool, tool=module.Tool())
        source = "udf = lambda x: (helper(x), Tool, tool, lib)"
        exec(compile(source, "own.py", "exec", dont_inherit=True), own.__dict__)
        return digest_of_code(own.udf)

    assert digest(MODULE) == digest(MODULE.replace("x - 5", "x - 6").replace("= 1", "= 2"))


LIMIT = 3


def helper(value: int) -> int:
    return value + LIMIT


def uses_helper(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": helper(row["id"])}


def uses_helper_too(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": helper(row["id"])}


def takes_any(row: Any, **_: Any) -> Any:
    return row


def takes_none(row: Any, **_: Any) -> Any:
    return None


class WithState:
    bound = 1

    def __init__(self, start: int) -> None:
        self.start = start

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"] + self.start + self.bound}


def test_digests_of_udfs(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(n: Any) -> Any:
        return lambda row: row["id"] * n

    same = [
        (uses_helper, uses_helper_too),
        (uses_helper, resumable(uses_helper)),
        (times(2), times(2)),
        (times(object()), times(object())),
        (WithState(1), WithState(1)),
        (functools.partial(takes_any, a=1), functools.partial(takes_any, a=1)),
    ]
    for one, other in same:
        assert digest_of_code(one) == digest_of_code(other)
    different = [
        *(uses_helper, helper, times(2), times(3), WithState, WithState(1), WithState(2), len),
        *(WithState(1).__call__, functools.partial(takes_any, a=1), lambda row: {"a", "b", "c"}),
        *(functools.partial(takes_any, a=2), lambda row: {"a", "b"}, json.dumps),
        *(functools.partial(takes_none, a=2), resumable(functools.partial(takes_none, a=1))),
    ]
    digests = [digest_of_code(udf) for udf in different]
    assert len(set(digests)) >= len(different) - 1
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 4)
    assert digest_of_code(uses_helper) != digests[0]
    monkeypatch.setattr(WithState, "bound", 2)
    assert digest_of_code(WithState) != digests[4]


HOSTILE = """
import datetime, functools

armed = False

def trap(result=None):
    def trapped(self, *args):
        assert not armed, "A user's code was executed."
        return result
    return trapped

class Meta(type):
    __bool__ = __len__ = trap(1)
    __eq__ = __ne__ = __instancecheck__ = __subclasscheck__ = trap(False)
    __hash__ = trap(1)
    __repr__ = trap("")
    __dir__ = trap(())
    __iter__ = trap(iter(()))
    def __getattribute__(cls, name):
        assert not armed, name
        return type.__getattribute__(cls, name)

class Hostile(metaclass=Meta):
    __slots__ = ("a", "__dict__")
    __eq__ = __ne__ = __contains__ = trap(False)
    __bool__ = __len__ = __index__ = __hash__ = trap(1)
    __repr__ = __str__ = __fspath__ = __format__ = trap("")
    __getitem__ = __getattr__ = __reduce_ex__ = __dir__ = trap()
    __iter__ = keys = items = values = trap(())
    __class__ = property(trap(int))
    number = property(trap(1))
    def __getattribute__(self, name):
        assert not armed, name
        return object.__getattribute__(self, name)
    def __call__(self, x):
        return x

class Words(dict, metaclass=Meta):
    __iter__ = keys = items = values = __getitem__ = __contains__ = __len__ = trap(())

class Items(list, metaclass=Meta):
    __iter__ = __getitem__ = __contains__ = __len__ = __eq__ = trap(())

class Text(str, metaclass=Meta):
    __eq__ = __hash__ = __repr__ = __str__ = __iter__ = __len__ = encode = trap(0)

class Day(datetime.datetime, metaclass=Meta):
    __repr__ = __str__ = isoformat = year = __eq__ = __hash__ = property(trap(0))

class Zone(datetime.tzinfo):
    __repr__ = trap("")
    utcoffset = dst = tzname = trap()

def held(value):
    @functools.wraps(plain)
    def inner(x, default=value, *, by_name={value: 1}):
        return value, GLOBAL
    return inner

def plain(x):
    return x

MIDNIGHT = datetime.datetime(2026, 1, 1, tzinfo=Zone())
GLOBAL = (Hostile(), Items([1]), Words(a=1), Day(2026, 1, 1), MIDNIGHT)
one = Hostile()
one.a, one.then = Hostile(), [Hostile(), {Hostile(): Hostile}]
udfs = {
    "a function": held(Hostile()),
    "an object": one,
    "a method": one.__call__,
    "a class": Hostile,
    "a partial": functools.partial(plain, one, x={one, Text("a")}),
    "a decorated object": functools.wraps(plain)(functools.partial(one)),
}
"""


@pytest.mark.parametrize("owner", ["own", "other"])
def test_no_code_of_a_user_is_executed(owner: str) -> None:
    module = types.ModuleType(owner)
    exec(compile(HOSTILE, "own.py", "exec", dont_inherit=True), module.__dict__)
    udfs = dict(module.udfs)
    if owner == "other":
        # The objects of another module are none of the UDF's own.
        own = types.ModuleType("own")
        exec("def holding(held):\n return lambda x: held", own.__dict__)
        udfs = {name: own.holding([udf]) for name, udf in udfs.items()}
    module.__dict__["armed"] = True
    try:
        for name, udf in udfs.items():
            assert len(digest_of_code(udf)) == 12, name
    finally:
        module.__dict__["armed"] = False


@pytest.mark.long
def test_deep_and_large_values_end() -> None:
    deep: list[Any] = [len]
    for _ in range(100_000):
        deep = [deep]
    wide = {number: [len] for number in range(30_000)}
    assert digest_of_code(lambda x: deep) == digest_of_code(lambda x: deep)
    assert digest_of_code(lambda x: wide) == digest_of_code(lambda x: wide)


def test_a_record_of_before_says_nothing_of_code() -> None:
    assert pipeline_hash("s")[4:] == bytes(4)
    assert pipeline_hash("s", "code")[:4] == pipeline_hash("s")[:4]
    assert Code.read({"signature": "s"}) is None
    code = Code.of([("map(f)", helper), ("map(g)", uses_helper)])
    assert Code.read(json.loads(json.dumps({"code": code.header()}))) == code
    assert code.differing(Code.of([("map(f)", helper), ("map(g)", helper)])) == ["map(g)"]
