"""Ray Data's expressions: which may stand in a resumable pipeline, and what columns are made of.

Pure: nothing here executes or plans. Each class of expression is on one of the lists below. One
that is on neither, such as one of a newer Ray, is refused by its name.

A row keeps its token through a projection or a filter. So an expression may be anything that is
made for each row by itself, also at random. Two executions of a task then give different values,
and every row is still there once. A value that depends on the *position* of a row is refused: a
run that resumes counts from zero again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple

from ray.data.expressions import Expr, StarExpr, UDFExpr, col

from ray_resume.core.plain_values import digest_of_value

__all__ = ["Columns", "Refusal", "conjuncts", "describe", "is_repeatable", "refusal_of"]

_HOME = "ray.data.expressions"

# By name, since an older Ray has not all of them.
_OF_THE_ROW = {
    "AliasExpr",
    "BinaryExpr",
    "ColumnExpr",
    "LiteralExpr",
    "PyArrowComputeUDFExpr",
    "StarExpr",
    "UDFExpr",
    "UnaryExpr",
    "UnnestExpr",
}
_DRAWN = {"RandomExpr", "UUIDExpr"}

_SYMBOLS = {
    "ADD": "+",
    "SUB": "-",
    "MUL": "*",
    "DIV": "/",
    "MOD": "%",
    "FLOORDIV": "//",
    "GT": ">",
    "LT": "<",
    "GE": ">=",
    "LE": "<=",
    "EQ": "==",
    "NE": "!=",
    "AND": "&",
    "OR": "|",
    "IN": "in",
    "NOT_IN": "not in",
}

_LONGEST_LITERAL = 60
_SIMPLE = (bool, int, float, str, bytes, type(None))


class Refusal(NamedTuple):
    """Why an expression cannot be in a resumable pipeline, and what to do instead."""

    problem: str
    way_out: str


def refusal_of(expression: Expr) -> Refusal | None:
    """Say what in ``expression`` a resumable pipeline cannot have; None: nothing."""
    return next(filter(None, map(_refusal, _parts(expression))), None)


def is_repeatable(expression: Expr) -> bool:
    """Say whether ``expression`` gives the same for the same row, whenever it is evaluated."""
    return all(_kind(part) in _OF_THE_ROW and _refusal(part) is None for part in _parts(expression))


def conjuncts(predicate: Expr) -> list[Expr]:
    """Return what ``predicate`` joins by "and", all of which must hold."""
    if _kind(predicate) == "BinaryExpr" and _of(predicate, "op").name == "AND":
        return [
            *conjuncts(_of(predicate, "left")),
            *conjuncts(_of(predicate, "right")),
        ]
    return [predicate]


def describe(expression: Expr) -> str:
    """Format an expression so that equal ones are equal texts, in every run and version of Ray."""
    kind = _kind(expression)
    if kind == "ColumnExpr":
        return _name(_of(expression, "_name"))
    if kind == "LiteralExpr":
        return _literal(_of(expression, "value"))
    if kind == "BinaryExpr":
        left, right = describe(_of(expression, "left")), describe(_of(expression, "right"))
        operation = _of(expression, "op")
        return f"({left} {_SYMBOLS.get(operation.name, operation.value)} {right})"
    if kind == "UnaryExpr":
        return f"{_of(expression, 'op').value}({describe(_of(expression, 'operand'))})"
    if kind == "AliasExpr":
        return describe(_of(expression, "expr"))
    if isinstance(expression, UDFExpr):
        return _described_call(expression)
    named = {"StarExpr": "*", "RandomExpr": "random()", "UUIDExpr": "uuid()"}
    return named.get(kind, kind)


@dataclass(frozen=True)
class Columns:
    """The columns that a run of projections makes of those of its input.

    Args:
        made: the columns that come out, by name, as expressions of the input's columns.
        rest: whether all other columns of the input come out, too,
        without: but for these.
    """

    made: Mapping[str, Expr] = field(default_factory=dict)
    rest: bool = True
    without: frozenset[str] = frozenset()

    def of_input(self, expression: Expr) -> Expr:
        """Rewrite an expression of the columns that come out as one of the input's columns."""
        substituted: Expr = _mapped(expression, self._column)
        return substituted

    def project(self, expressions: Sequence[Expr], shared: Sequence[Expr] = ()) -> Columns:
        """Return what comes out of a projection above these.

        Args:
            expressions: what it makes: named expressions, and a star for all that there is.
            shared: named parts of ``expressions`` that are evaluated first.
        """
        if shared:
            held: dict[Any, Expr] = {**self.made}
            held.update((part.name, self.of_input(part)) for part in shared)
            within = dataclasses.replace(self, made=_unaliased(held))
            done = within.project(expressions)
            names = {part.name for part in shared}
            made = {name: made for name, made in done.made.items() if name not in names}
            return dataclasses.replace(done, made=made)
        named = [expr for expr in expressions if not isinstance(expr, StarExpr)]
        new = _unaliased({expr.name: self.of_input(expr) for expr in named})
        if len(named) == len(expressions):
            return Columns(new, False)
        renames = [expr for expr in named if getattr(expr, "_is_rename", False)]
        renamed = {str(_of(expr, "expr").name): str(expr.name) for expr in renames}
        # A column that is renamed stays where it is.
        made = {
            renamed.get(name, name): new[renamed[name]] if name in renamed else made
            for name, made in self.made.items()
        }
        gone = frozenset(renamed) if self.rest else frozenset()
        return Columns({**made, **new}, self.rest, self.without | gone)

    def without_new(self, names: Collection[str]) -> Columns:
        """Return these columns without those of ``names`` that pass through as they are."""
        made = {
            name: expr
            for name, expr in self.made.items()
            if name not in names or not _is_column(expr, name)
        }
        return dataclasses.replace(self, made=made)

    def describe(self, input_names: Sequence[str] | None = None) -> str:
        """Format what comes out: ``*`` for all other columns, as if nothing had listed them.

        Args:
            input_names: the columns of the input, if they are known: Ray then lists them in
                place of a star.
        """
        made, rest, without = dict(self.made), self.rest, set(self.without)
        if input_names is not None:
            named = {name: col(name) for name in input_names if rest and name not in without}
            made, rest = {**named, **made}, False
            if all(_passes(made, name) for name in input_names):
                rest, without = True, {name for name in input_names if name not in made}
        if not rest:
            texts = [_described(name, expr) for name, expr in made.items()]
            # The order of what was selected is the user's; that of the others may be Ray's.
            return ", ".join(texts if "=" not in "".join(texts) else sorted(texts))
        star = "*" + "".join(f" without {_name(name)}" for name in sorted(without - made.keys()))
        other = (_described(name, made[name]) for name in made if not _is_column(made[name], name))
        return ", ".join([star, *sorted(other)])

    def _column(self, expression: Expr) -> Expr:
        name = expression.name
        return self.made.get(name, expression) if name is not None else expression


def _passes(made: Mapping[str, Expr], name: str) -> bool:
    """Say whether a column of the input comes out, perhaps renamed, or is replaced."""
    return name in made or any(_is_column(expr, name) for expr in made.values())


def _is_column(expression: Expr, name: str) -> bool:
    return _kind(expression) == "ColumnExpr" and expression.name == name


def _described(name: str, expression: Expr) -> str:
    text = describe(expression)
    return text if text == _name(name) else f"{_name(name)}={text}"


def _refusal(part: Expr) -> Refusal | None:
    kind = _kind(part)
    if kind == "MonotonicallyIncreasingIdExpr":
        return Refusal(
            "uses monotonically_increasing_id(), which counts from zero again in each run. Rows of "
            "a run and of the one that resumes it would get the same ids.",
            "Use uuid(), or have a @resumable UDF make the id from the row itself.",
        )
    if kind == "RandomExpr" and _of(part, "seed") is not None:
        return Refusal(
            "uses random(seed=...), whose numbers begin again in each run. Rows of a run and of "
            "the one that resumes it would get the same numbers.",
            "Use random() without a seed; or have a @resumable UDF take a hash of something in the "
            "row, which is the same in every run.",
        )
    if isinstance(part, UDFExpr) and not _is_rays_own(part.fn):
        return Refusal(
            "runs a UDF inside an expression, which cannot be decorated.",
            "Say the same with map_batches and a @resumable UDF.",
        )
    if kind not in _OF_THE_ROW | _DRAWN:
        return Refusal(
            f"has an expression of the type {type(part).__name__}, and ray_resume does not know "
            "whether its value depends on the row alone.",
            "Say the same with map_batches and a @resumable UDF.",
        )
    return None


def _kind(expression: Expr) -> str:
    """Return the name of Ray's class of an expression, and of none that a user has derived."""
    cls = type(expression)
    return cls.__name__ if cls.__module__ == _HOME else f"{cls.__module__}.{cls.__name__}"


def _is_rays_own(function: Any) -> bool:
    # A `udf` of a user's class is an object of a class of Ray's, and is not meant.
    return isinstance(function, FunctionType) and function.__module__.startswith("ray.data.")


def _of(expression: Expr, name: str) -> Any:
    return getattr(expression, name)


def _parts(value: Any) -> Iterator[Expr]:
    if isinstance(value, Expr):
        yield value
        value = [getattr(value, part.name) for part in dataclasses.fields(value)]
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for child in value:
            yield from _parts(child)


def _mapped(value: Any, column: Any) -> Any:
    """Return ``value`` with each column in it replaced by what ``column`` makes of it."""
    if isinstance(value, Expr):
        if _kind(value) == "ColumnExpr":
            return column(value)
        changes = {}
        for part in dataclasses.fields(value):
            before = getattr(value, part.name)
            after = _mapped(before, column)
            if after is not before and part.init:
                changes[part.name] = after
        return dataclasses.replace(value, **changes) if changes else value
    if isinstance(value, (list, tuple)) and any(isinstance(item, Expr) for item in value):
        return type(value)([_mapped(item, column) for item in value])
    if isinstance(value, dict) and any(isinstance(item, Expr) for item in value.values()):
        return {name: _mapped(item, column) for name, item in value.items()}
    return value


def _unaliased(made: Mapping[Any, Expr]) -> dict[str, Expr]:
    return {
        name: _of(expr, "expr") if _kind(expr) == "AliasExpr" else expr
        for name, expr in made.items()
    }


def _described_call(call: Any) -> str:
    function = getattr(call, "pc_func", None) or call.fn
    arguments = [*map(describe, call.args)]
    arguments += [f"{name}={describe(value)}" for name, value in sorted(call.kwargs.items())]
    arguments += map(_literal, getattr(call, "pc_positional", ()))
    arguments += _options(getattr(call, "pc_kwargs", {}))
    name = getattr(function, "__name__", type(function).__name__).strip("_")
    return f"{name}({', '.join(arguments)}): {call.data_type!r}"


def _options(options: Mapping[str, Any]) -> Iterable[str]:
    return (f"{name}={_literal(value)}" for name, value in sorted(options.items()))


def _literal(value: Any) -> str:
    """Format a constant; of what has no lasting text of its own, a digest or its type."""
    simple = all(type(item) in _SIMPLE for item in (value if type(value) is list else [value]))
    text = repr(value)
    if simple and len(text) <= _LONGEST_LITERAL:
        return text
    digest = digest_of_value(value)
    return f"<{type(value).__name__}>" if digest is None else f"{type(value).__name__}#{digest}"


def _name(name: str) -> str:
    return name if name.isidentifier() else repr(name)
