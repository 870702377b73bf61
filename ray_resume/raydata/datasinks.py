"""Facts about Ray Data's datasinks.

Internals of Ray's that are used:

* ``_FileDatasink``: the base class of its datasinks for files in a folder.
* ``WRITE_UUID_KWARG_NAME``: where a write task finds the id that its files are named by.
"""

from __future__ import annotations

from typing import Any

from ray_resume.raydata.internals import unknown_ray

try:
    from ray.data._internal.planner.plan_write_op import WRITE_UUID_KWARG_NAME
    from ray.data.datasource.file_datasink import _FileDatasink
except ImportError as error:
    raise unknown_ray(error) from error

__all__ = ["WRITE_UUID_KWARG_NAME", "is_file_datasink"]


def is_file_datasink(datasink: Any) -> bool:
    """Say whether ``datasink`` is one of Ray's own for files in a folder."""
    return isinstance(datasink, _FileDatasink)
