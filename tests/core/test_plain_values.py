"""What stands for values of users' code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field

import pyarrow.compute as pc
import pytest

from ray_resume.core.plain_values import digest_of_value


@dataclass
class Config:
    size: int
    names: list[str] = field(default_factory=list)


def test_a_dataclass_is_plain_and_its_class_is_not() -> None:
    assert digest_of_value(Config(1)) == digest_of_value(Config(1))
    assert digest_of_value(Config(1)) != digest_of_value(Config(2))
    # A UDF that makes one names the class. Its fields have no values there.
    assert digest_of_value(Config) is None


def test_regular_expressions_are_plain_with_their_flags() -> None:
    # The end of a long one is not in its `repr`.
    long = "a" * 300
    patterns = [re.compile(text, flags) for text in (long, long + "b") for flags in (0, re.DOTALL)]
    digests = [digest_of_value(one) for one in [*patterns, re.compile(long.encode())]]
    assert len({*digests, None}) == 6
    assert digest_of_value([re.compile(long)]) == digest_of_value([patterns[0]])


def test_expressions_of_arrow_are_plain_with_all_their_values() -> None:
    def is_in(values: list[int], others: list[int]) -> str | None:
        condition = pc.field("a").isin(values) & pc.field("b").isin(others)
        return digest_of_value({"filter": condition, "columns": ["a"]})

    many = list(range(50))
    assert is_in(many, many) == is_in(many, many) is not None
    # Its text shows the first and the last ones.
    changed = [*many[:25], 99, *many[26:]]
    assert len({is_in(many, many), is_in(changed, many), is_in(many, changed)}) == 3
    assert digest_of_value(pc.field("a") > 5) != digest_of_value(pc.field("a") > 6)
    drawn = pc.Expression._call("random", [], pc.RandomOptions())
    assert digest_of_value(drawn < 0.5) is None


ICEBERG = """
from pyiceberg.expressions import And, AlwaysTrue, EqualTo, GreaterThan, In, Not
from ray_resume.core.plain_values import digest_of_value
some = [GreaterThan("id", 5), GreaterThan("id", 6), GreaterThan("x", 5), In("id", ["a", "b", "c"])]
some += [And(some[0], some[3]), Not(some[0]), EqualTo("id", 5), AlwaysTrue()]
digests = [digest_of_value(one) for one in some]
assert len({*digests, None}) == 9
print(digests)
"""


def test_expressions_of_iceberg_are_plain_and_the_same_in_each_process() -> None:
    pytest.importorskip("pyiceberg")
    told = {
        subprocess.run(
            [sys.executable, "-c", ICEBERG],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert len(told) == 1
