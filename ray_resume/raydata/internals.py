"""Which versions of Ray are known, and how internals that moved are found.

The modules of this package import Ray's internals by name, and say with `check_used` what else they
use of a class. So the import of ray_resume fails with a clear error where something has moved.
"""

from __future__ import annotations

import dataclasses
import dis
import inspect
from collections.abc import Mapping
from types import CodeType
from typing import Any

import ray

__all__ = ["TESTED_RAY", "check_used", "unknown_ray"]

# From the first to before the second. `pyproject.toml` says the same to pip. But an image of a
# cluster often has its own Ray, or gets another one later, and then pip only warns. Here it is an
# error: rows are safe only if Ray runs the read tasks, and moves the operators, that it is known
# to. A Ray that does so differently need not have renamed anything.
TESTED_RAY = ((2, 56), (2, 61))


def unknown_ray(reason: object) -> ImportError:
    """Make the error for a Ray whose insides are not those that this package was tested with."""
    first, beyond = (".".join(map(str, version)) for version in TESTED_RAY)
    return ImportError(
        f"ray_resume does not know the insides of Ray {ray.__version__}: {reason}. "
        f"Install one that it was tested with: pip install 'ray[data]>={first},<{beyond}'"
    )


if not TESTED_RAY[0] <= tuple(map(int, ray.__version__.split(".")[:2])) < TESTED_RAY[1]:
    raise unknown_ray("it was never tested with it")


def check_used(used: Mapping[Any, str]) -> None:
    """Find at import what has moved in Ray, not in the middle of a run.

    Args:
        used: for each class of Ray's, the names that are used of it, separated by spaces.

    Raises:
        ImportError: a class has not all of them.
    """
    for owner, names in used.items():
        missing = set(names.split()) - set(dir(owner))
        if dataclasses.is_dataclass(owner):
            missing -= {field.name for field in dataclasses.fields(owner)}
        # Attributes of instances are found where a method sets them.
        for method in (value for base in owner.__mro__ for value in vars(base).values()):
            if missing and inspect.isfunction(method):
                missing -= _set_by(inspect.unwrap(method).__code__, missing)
        if missing:
            lost = ", ".join(name for name in names.split() if name in missing)
            raise unknown_ray(f"{owner.__name__} has no {lost}")


def _set_by(code: CodeType, names: set[str]) -> set[str]:
    """Return those of ``names`` that ``code`` sets as attributes."""
    if names.isdisjoint(code.co_names):
        return set()
    return {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
