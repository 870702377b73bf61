"""A pipeline's signature: one line of text that says what its output depends on.

Two pipelines with the same signature make the same columns of the same sources, if their UDFs do
the same: :mod:`ray_resume.core.code` compares those. A signature is the same whether a dataset was
iterated over before or not, in every process, and with every version of Ray. Between two UDFs it
says what filters and projections amount to, however Ray has joined or moved them.

Arguments may be secrets: numbers are shown by name, texts and other values as digests. Constants in
expressions are shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.data.expressions import Expr, col

from ray_resume.core.code import Code
from ray_resume.core.plain_values import digest_of_value, is_secret
from ray_resume.raydata import plan
from ray_resume.raydata.expressions import Columns, conjuncts, describe
from ray_resume.raydata.llm import signed_arguments

__all__ = ["Signature", "described_values", "signature_of"]


@dataclass(frozen=True)
class Signature:
    """A pipeline's signature, and the code that it runs.

    Args:
        text: what has to be the same for completed sources to stay as they are.
        code: what may differ; the user is to know of it.
        versions: those that the user gave to UDFs, in their order.
    """

    text: str
    code: Code
    versions: tuple[str, ...] = ()


def signature_of(
    chain: plan.Chain,
    *,
    read: str,
    read_udfs: Sequence[tuple[str, Any]],
    predicates: Sequence[Expr],
    columns: Sequence[str] | None,
    input_names: Sequence[str] | None,
    write: str,
    new_names: Collection[str] = (),
    version_of: Callable[[Any], str | None] = lambda _: None,
) -> Signature:
    """Describe a chain as Ray's optimizer has left it.

    Args:
        read: describes the reader and its options.
        read_udfs: the user's functions that the reader calls, by name.
        predicates: the filters that Ray has pushed into the read.
        columns: the columns that it has pushed into the read, None for all.
        input_names: the columns that there are without that, None if they are not known.
        write: describes the sink.
        new_names: columns of the input that are to be left out, as if it did not have them.
        version_of: returns the version that the user gave to a UDF, if any.
    """
    steps, udfs, versions = [read], list(read_udfs), list[str]()
    segment = _Segment(input_names, new_names)
    for predicate in predicates:
        segment.filter(predicate)
    if columns is not None:
        segment.select(columns)
    for operator in chain.operators:
        method = plan.method_of(operator)
        if hasattr(operator, "exprs"):
            segment.project(operator.exprs, getattr(operator, "_common_sub_exprs", ()))
        elif getattr(operator, "predicate_expr", None) is not None:
            segment.filter(operator.predicate_expr)
        elif method is not None:
            name = _name_of(operator)
            version = version_of(operator.fn)
            versions += [] if version is None else [version]
            named = _udf(name, operator) + ("" if version is None else f", version={version}")
            steps += [*segment.steps(), f"{method}({named})"]
            if plan.dropped_columns(operator) is None:
                udfs.append((f"{method}({name})", operator.fn))
            segment = _Segment(None)
        elif downloaded := plan.downloads(operator):
            # One by one: newer versions of Ray put several in a row into one operator.
            steps += [
                *segment.steps(),
                *(f"download({into}={address})" for address, into in downloaded),
            ]
            segment = _Segment(None)
    steps += [*segment.steps(), *([write] if write else [])]
    return Signature(" -> ".join(steps), Code.of(udfs), tuple(versions))


_NUMBERS = (bool, int, float, type(None))


class _Segment:
    """The filters and projections between two UDFs, as one step of each kind."""

    def __init__(self, input_names: Sequence[str] | None, new_names: Collection[str] = ()) -> None:
        self._names, self._new = input_names, new_names
        self._columns = Columns()
        self._conditions: set[str] = set()

    def filter(self, predicate: Expr) -> None:
        for condition in conjuncts(self._columns.of_input(predicate)):
            self._conditions.add(describe(condition))

    def project(self, expressions: Sequence[Expr], shared: Sequence[Expr]) -> None:
        self._columns = self._columns.project(expressions, shared)

    def select(self, names: Sequence[str]) -> None:
        self._columns = self._columns.project([col(name) for name in names])

    def steps(self) -> Iterator[str]:
        if self._conditions:
            yield f"filter({' & '.join(sorted(self._conditions))})"
        columns = self._columns.without_new(self._new).describe(
            self._names and [name for name in self._names if name not in self._new]
        )
        if columns != "*":
            yield f"columns({columns})"


def described_values(
    positional: Sequence[Any], named: Mapping[str, Any], shown: Collection[str] = ()
) -> list[str]:
    """Describe arguments: numbers as they are, other plain values as digests, the rest as dots.

    A secret, by its name, is shown as dots, so another secret makes no other pipeline. Values of
    ``shown`` names are shown.
    """
    texts = []
    for value in positional:
        digest = digest_of_value(value)
        texts.append("..." if digest is None else f"#{digest}")
    for name, value in sorted(named.items()):
        digest = None if is_secret(name) else digest_of_value(value)
        if digest is not None and (name in shown or isinstance(value, _NUMBERS)):
            texts.append(f"{name}={value}")
        else:
            texts.append(f"{name}={'...' if digest is None else f'#{digest}'}")
    return texts


def _udf(name: str, operator: Any) -> str:
    """Describe a UDF: its name, what it is made with, what it is called with."""
    dropped = plan.dropped_columns(operator)
    if dropped is not None:
        return f"{name}, {', '.join(dropped)}"
    made = described_values(
        _listed(operator.fn_constructor_args),
        signed_arguments(operator.fn, operator.fn_constructor_kwargs or {}),
    )
    positional, named = _bound(operator.fn)
    called = described_values(
        [*positional, *_listed(operator.fn_args)], {**named, **(operator.fn_kwargs or {})}
    )
    return ", ".join([f"{name}({', '.join(made)})" if made else name, *called])


def _bound(udf: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments that ``functools.partial`` has bound, around whatever decorators."""
    positional: list[Any] = []
    named: dict[str, Any] = {}
    while True:
        if isinstance(udf, partial):
            positional, named = [*udf.args, *positional], {**udf.keywords, **named}
            udf = udf.func
        elif hasattr(udf, "__wrapped__"):
            udf = udf.__wrapped__
        else:
            return positional, named


def _listed(arguments: Any) -> list[Any]:
    return list(arguments) if isinstance(arguments, (list, tuple)) else []


def _name_of(operator: Any) -> str:
    """Return the UDF's name, of which Ray makes the operator's."""
    match = re.fullmatch(r"\w+\((.*)\)", str(operator.name), re.DOTALL)
    return match[1] if match else str(operator.name)
