"""`checkpoint.json`: the id of a checkpoint, its kind and its format version."""

from __future__ import annotations

import json
import re

from ray_resume.errors import CheckpointError

__all__ = ["FORMAT_VERSION", "IDENTITY", "SHARED_LAYOUT", "identity_bytes", "read_identity"]

IDENTITY = "checkpoint.json"
SHARED_LAYOUT = "shared"
"""The layout in the identity of a checkpoint that hosts share."""

FORMAT_VERSION = 4
"""Raised by one whenever an older ray_resume could misread what a newer one writes."""


def identity_bytes(checkpoint_id: str, layout: str | None) -> bytes:
    """Return the content of the file for a new checkpoint."""
    identity = {"id": checkpoint_id, "layout": layout, "format": FORMAT_VERSION}
    return json.dumps(identity).encode()


def read_identity(data: bytes, layout: str | None, uri: str) -> str:
    """Return the id of the checkpoint ``uri``: 8 hexadecimal digits.

    Args:
        data: the content of the file.
        layout: the kind of checkpoint that it has to be.

    Raises:
        CheckpointError: it is of another format or kind.
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is damaged.
    """
    identity = json.loads(data)
    version, kind, checkpoint_id = identity["format"], identity.get("layout"), identity["id"]
    # It is in the names of output files, so it must not lead elsewhere.
    if re.fullmatch("[0-9a-f]{8}", checkpoint_id) is None:
        raise ValueError(f"its id is {checkpoint_id!r}")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"The checkpoint {uri} has format {version}, and this ray_resume reads format "
            f"{FORMAT_VERSION}. "
            + (
                "A version before the first release made it: go on with that version, or start "
                "over with an empty checkpoint and an empty output folder."
                if type(version) is int and version < FORMAT_VERSION
                else "Upgrade ray_resume, and run again."
            )
        )
    if kind != layout:
        raise CheckpointError(
            f"The checkpoint {uri} was made in a directory of one host's own. Such a "
            "checkpoint cannot be used where hosts share it. Put it back on a local disk, or "
            "start with a new checkpoint and a new output folder here."
        )
    return str(checkpoint_id)
