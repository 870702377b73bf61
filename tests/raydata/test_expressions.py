"""Expressions: which are refused, and what projections make of columns; without a cluster."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray.data.expressions as rays
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ray.data._internal.planner.plan_expression.expression_evaluator import eval_projection
from ray.data.datatype import DataType
from ray.data.expressions import Expr, col, lit, star

from ray_resume.raydata import expressions
from ray_resume.raydata.blocks import mask_of
from ray_resume.raydata.expressions import Columns

TYPES: Any = DataType


class Unknown(rays.LiteralExpr):
    """An expression of nobody's list."""


class Offset:
    def __call__(self, values: pa.Array) -> pa.Array:
        return values


UDF: Any = rays.udf(return_dtype=TYPES.int64())(lambda values: values)
UDF_CLASS: Any = rays.udf(return_dtype=TYPES.int64())(Offset)

ALLOWED = {
    "column": col("a"),
    "literal": lit(3),
    "arithmetic": (col("a") + 1) * col("b") / 2 - 7 // col("c"),
    "comparison": (col("a") > 1) & ~(col("b") == lit("x")) | col("c").is_null(),
    "is_in": col("a").is_in([1, 2]),
    "alias": col("a").alias("b"),
    "text": col("a").str.upper(),
    "round": col("a").round(),
    "cast": col("a").cast(TYPES.int32()),
    "list": col("a").list.len(),
    "random": rays.random() < 0.5,
    "uuid": rays.uuid(),
}

REFUSED = {
    "monotonically_increasing_id": (rays.monotonically_increasing_id(), "uuid()"),
    "within": (rays.monotonically_increasing_id() + col("a"), "counts from zero again"),
    "seeded random": (rays.random(seed=3) < 0.5, "without a seed"),
    "udf": (UDF(col("a")), "@resumable UDF"),
    "udf class": (UDF_CLASS()(col("a")), "@resumable UDF"),
    "download": (rays.download("a"), "DownloadExpr"),
    "of another type": (Unknown(3), "type Unknown"),
    "as an argument": (
        (rays.monotonically_increasing_id() + 1).cast(TYPES.string()),
        "monotonically_increasing_id()",
    ),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(name: str) -> None:
    assert expressions.refusal_of(ALLOWED[name]) is None
    assert expressions.is_repeatable(ALLOWED[name]) == (name not in ("random", "uuid"))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    expression, words = REFUSED[name]
    refusal = expressions.refusal_of(expression)
    assert refusal is not None
    assert words in f"{refusal.problem} {refusal.way_out}"
    assert not expressions.is_repeatable(expression)


def test_each_class_of_rays_is_on_a_list() -> None:
    # A class that a newer Ray adds is refused until somebody has looked at it, and is found here.
    known = {*expressions._OF_THE_ROW, *expressions._DRAWN}
    known |= {"Expr", "DownloadExpr", "MonotonicallyIncreasingIdExpr"}
    classes = {
        name
        for name, value in vars(rays).items()
        if isinstance(value, type) and issubclass(value, Expr) and value.__module__ == rays.__name__
    }
    assert classes - known == set()


TABLE = pa.table({"a": [1, 2, 3, None, 5], "b": [5, 4, 3, 2, 1], "c": [0, 0, 7, 7, 9]})
NAMES = st.sampled_from(["a", "b", "c", "d", "e"])


@st.composite
def projections(draw: Any) -> list[list[Expr]]:
    """Draw what selections, renames, swaps and columns that are added make of ``TABLE``."""
    names: list[str] = ["a", "b", "c"]
    steps: list[list[Expr]] = []
    for _ in range(draw(st.integers(1, 6))):
        which = draw(st.sampled_from(["select", "rename", "swap", "alias", "add"]))
        old = draw(st.sampled_from(names))
        new = draw(NAMES)
        if which == "select":
            names = draw(st.permutations(names))[: draw(st.integers(1, len(names)))]
            steps.append([col(name) for name in names])
        elif which == "swap" and len(names) > 1:
            one, other = draw(st.permutations(names))[:2]
            steps.append([star(), col(one)._rename(other), col(other)._rename(one)])
        elif which == "rename" and new not in names:
            names = [new if name == old else name for name in names]
            steps.append([star(), col(old)._rename(new)])
        elif which in ("alias", "add"):
            made = col(old) if which == "alias" else col(old) * 2 + 1
            names = [*(name for name in names if name != new), new]
            steps.append([star(), made.alias(new)])
    return steps


def after(steps: list[list[Expr]]) -> Columns:
    columns = Columns()
    for step in steps:
        columns = columns.project(step)
    return columns


@given(projections(), st.integers(0, 6))
@settings(max_examples=300)
def test_columns_are_what_projections_make(steps: list[list[Expr]], bound: int) -> None:
    expected: Any = TABLE
    for step in steps:
        expected = eval_projection(step, expected)
    columns = after(steps)
    made = [columns.of_input(col(name)).alias(name) for name in expected.column_names]
    result: Any = eval_projection(made, TABLE)
    assert result.to_pydict() == expected.to_pydict()
    rest = {name for name in TABLE.column_names if columns.rest and name not in columns.without}
    assert {*columns.made, *rest} == set(expected.column_names)
    predicate = col(expected.column_names[0]) > bound
    masks = mask_of(columns.of_input(predicate), TABLE), mask_of(predicate, expected)
    assert masks[0].tolist() == masks[1].tolist()


SWAP = [star(), col("a")._rename("b"), col("b")._rename("a")]


@given(projections())
@example([[col("a"), col("b")], SWAP, SWAP])
@settings(max_examples=200)
def test_a_star_that_ray_has_expanded_is_described_as_one(steps: list[list[Expr]]) -> None:
    expanded, schema = [], TABLE.schema
    for step in steps:
        expanded.append(rays.expand_star_exprs(step, schema))
        table = eval_projection(step, schema.empty_table())
        assert isinstance(table, pa.Table)
        schema = table.schema
    names = TABLE.column_names
    assert after(steps).describe(names) == after(expanded).describe(names)


def test_shared_parts_are_put_back() -> None:
    shared = [(col("a") + 1).alias("__temp")]
    columns = Columns().project([star(), (col("__temp") * col("__temp")).alias("x")], shared)
    assert columns.describe() == "*, x=((a + 1) * (a + 1))"


def test_descriptions() -> None:
    texts = {
        "*": Columns(),
        "*, b=a": Columns().project([star(), col("a").alias("b")]),
        "* without a, b=a": Columns().project([star(), col("a")._rename("b")]),
        "c, a": Columns().project([col("c"), col("a")]),
    }
    for text, columns in texts.items():
        assert columns.describe() == text
    odd: Any = [{"x", "y", "z"}, object(), pa.scalar(3), [object()], np.arange(3), {"k": {1}}]
    for value in odd:
        text = expressions.describe(col("a") == lit(value))
        assert " at 0x" not in text
        assert "'x'" not in text, "the order of a set is another one in each process"
    assert expressions.describe(col("a") == lit("it's")) == """(a == "it's")"""
    long = expressions.describe(col("a").is_in(list(range(1000))))
    assert len(long) < 100
    assert long != expressions.describe(col("a").is_in(list(range(999))))
    assert [*map(expressions.describe, expressions.conjuncts((col("a") > 1) & (col("b") < 2)))] == [
        "(a > 1)",
        "(b < 2)",
    ]


@pytest.mark.parametrize("values", [[1.0, float("nan"), 0.0], ["a", "", None], [None, None, None]])
def test_a_filter_that_is_no_boolean_is_an_error(values: list[Any]) -> None:
    table = pa.table({"x": values})
    with pytest.raises(pa.ArrowNotImplementedError, match="must be boolean") as plain:
        table.filter(table["x"])
    with pytest.raises(type(plain.value), match="must be boolean"):
        mask_of(col("x"), table)
