"""What stands for values of users' code."""

from __future__ import annotations

from dataclasses import dataclass, field

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
