"""How many read tasks plain Ray Data would give an input.

Internals of Ray's that are used:

* ``_autodetect_parallelism``: the rule itself, which goes by the size of the input in memory, by
  the cluster's CPUs and by the options of the ``DataContext``. So tiny inputs get few read tasks.
"""

from __future__ import annotations

from ray.data import DataContext

from ray_resume.raydata.internals import unknown_ray

try:
    from ray.data._internal.util import _autodetect_parallelism
except ImportError as error:
    raise unknown_ray(error) from error

__all__ = ["detected_read_tasks"]


def detected_read_tasks(size_bytes: int | None, context: DataContext) -> int:
    """Return how many read tasks plain Ray Data would choose for an input of so many bytes.

    Args:
        size_bytes: in memory; None if it is not known.
        context: that of the dataset.
    """
    count, *_ = _autodetect_parallelism(
        -1, context.target_max_block_size, context, mem_size=size_bytes
    )
    return int(count)
