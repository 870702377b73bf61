"""The code of UDFs, as digests: whether a run goes on with the code of an earlier one. Pure.

`core.code_digest` says what a digest covers. Each version of Python has its own bytecode, so
digests of two versions cannot be compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray_resume.core.code_digest import digest_of_code

__all__ = ["Code"]

_PYTHON = "{}.{}".format(*sys.version_info)


@dataclass(frozen=True)
class Code:
    """The code that a pipeline runs: a name and a digest for each UDF, in order."""

    udfs: tuple[tuple[str, str], ...] = ()
    python: str = _PYTHON

    @classmethod
    def of(cls, udfs: Iterable[tuple[str, Any]]) -> Code:
        """Take digests of UDFs by name."""
        return cls(tuple((name, digest_of_code(udf)) for name, udf in udfs))

    @classmethod
    def read(cls, header: Mapping[str, Any]) -> Code | None:
        """Return the code that the header of a run tells of, None if it tells of none."""
        try:
            said = header["code"]
            return cls(tuple((str(name), str(of)) for name, of in said["udfs"]), said["python"])
        except (KeyError, TypeError, ValueError):
            return None

    def header(self) -> dict[str, Any]:
        """Return what :meth:`read` finds in a run's header, plain JSON data."""
        return {"udfs": [list(udf) for udf in self.udfs], "python": self.python}

    def digest(self) -> str:
        """Return a text that stands for all of it; empty if there is no UDF."""
        return json.dumps(self.header()) if self.udfs else ""

    def differing(self, other: Code) -> list[str]:
        """Return the names of the UDFs that have another digest in ``other``."""
        pairs = zip(self.udfs, other.udfs, strict=False)
        return list(dict.fromkeys(one[0] for one, another in pairs if one != another))
