"""Refuses Ray Client, checkpoints in copied folders, and plain writes.

Internals of Ray's that are used:

* ``ray.util.client.ray.is_connected``: to refuse Ray Client, as Ray Data asks for it itself.
* Where Ray unpacks a job's ``working_dir``: a relative checkpoint would be made there, and be lost.
* ``Dataset.write_datasink``, which all ``write_*`` call: it is wrapped, to refuse a plain write of
  a resumable dataset. Ray's own callbacks come when an execution starts. By then a sink for files
  has made its folder, or emptied it (``mode="overwrite"``).
"""

from __future__ import annotations

import functools
import os
from typing import Any

import ray
import ray.util.client
from ray.data import Dataset

from ray_resume.errors import CheckpointError, NonResumableError, ResumeError
from ray_resume.raydata import plan

__all__ = [
    "allow_write",
    "refuse_plain_writes",
    "refuse_ray_client",
    "refuse_working_dir_copy",
]

_WORKING_DIR_COPIES = "/runtime_resources/working_dir_files/"

# In the context of a dataset, which all have that are derived from it.
_REFUSED = "ray_resume.refuses_plain_writes"


def refuse_ray_client() -> None:
    """Make sure that this process is a driver in the cluster, not a client of one.

    Raises:
        ResumeError: it is a client, or Ray would make it one as soon as it starts.
    """
    if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
        how = "This process is connected to its cluster through Ray Client (ray://)"
    elif not ray.is_initialized() and os.environ.get("RAY_ADDRESS", "").startswith("ray://"):
        how = "RAY_ADDRESS would connect this process to its cluster through Ray Client (ray://)"
    else:
        return
    raise ResumeError(
        f"{how}, and so it is on none of the cluster's nodes. A run's checkpoint, its locks and "
        "its ledger must be on the node where the driver is. Nothing was started. Have the same "
        "script run in the cluster: ray job submit --address http://HEAD:8265 --working-dir . -- "
        "python SCRIPT. Or start it on one of the nodes, with ray.init() and no ray:// address."
    )


def refuse_working_dir_copy(path: str) -> None:
    """Make sure that the checkpoint at ``path`` is in no copy of a working directory of Ray's.

    Raises:
        CheckpointError: it is in one, and would be lost with it.
    """
    if _WORKING_DIR_COPIES in os.path.realpath(path):
        raise CheckpointError(
            f"The checkpoint {path} is in the copy of your working directory that Ray has made for "
            "this job. Whenever a file of yours changes it makes another copy, and all are gone "
            "with the cluster: the next run would start from zero. Give an absolute path to a "
            "disk that stays, for the checkpoint and for the output."
        )


def refuse_plain_writes(dataset: Dataset) -> None:
    """Make a plain ``write_*`` on ``dataset``, and on what is derived from it, an error."""
    dataset.context.set_config(_REFUSED, True)
    plain: Any = Dataset.write_datasink
    if hasattr(plain, _REFUSED):
        return

    @functools.wraps(plain)
    def write_datasink(self: Dataset, *args: Any, **kwargs: Any) -> Any:
        if self.context.get_config(_REFUSED):
            raise NonResumableError(
                "A plain write_* of a dataset from resumable_read would not be resumable: "
                "nothing would be skipped, and a crash would leave duplicates. It is in "
                f"brackets here: {plan.position_of_write(self)}. Use resumable_write(ds, folder)."
            )
        return plain(self, *args, **kwargs)

    setattr(write_datasink, _REFUSED, True)
    Dataset.write_datasink = write_datasink  # type: ignore[method-assign]


def allow_write(dataset: Dataset) -> None:
    """Let ``dataset``, which has a context of its own, be written."""
    dataset.context.remove_config(_REFUSED)
