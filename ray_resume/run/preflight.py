"""Checks of a run between reading the checkpoint and starting a ledger.

Each check refuses the run, or warns of something that the user may not expect.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.contents import Contents
from ray_resume.core.code import Code
from ray_resume.core.record_log import Flag
from ray_resume.core.records import Record, State, pipeline_hash
from ray_resume.core.snapshot import Snapshot
from ray_resume.core.sources import SourceTable
from ray_resume.core.wording import counted
from ray_resume.errors import CheckpointError
from ray_resume.run.output import Output

__all__ = ["refuse_other_output", "warn_other_code", "warn_rows_again"]

logger = logging.getLogger("ray_resume")


def refuse_other_output(storage: CheckpointBackend, output: str, contents: Contents) -> None:
    """Make sure that the checkpoint's output, if it has any yet, is ``output``.

    Raises:
        CheckpointError: the checkpoint has another output.
    """
    bound = storage.sink()
    if bound is None or bound == output:
        return
    if contents.live or _has_output(contents.snapshot):
        raise CheckpointError(
            f"The checkpoint {storage.uri} belongs to the output {bound}, and this run would "
            f"write to {output}. Write to {bound}, or give this pipeline a checkpoint of its own. "
            f"If the output was moved there, run: ray-resume rebind {storage.uri} {output}"
        )


def _has_output(snapshot: Snapshot) -> bool:
    """Return whether output was written: files, or rows that went elsewhere."""
    rows = snapshot.column("rows")[snapshot.in_state(State.COMPLETED)]
    return bool(rows.any() or len(snapshot.flagged(Flag.FILES)))


def warn_other_code(
    recoded: Sequence[Record], now: Code, headers: Mapping[str, Mapping[str, Any]]
) -> None:
    """Warn that ``recoded`` sources, which stay completed, went through other code.

    Args:
        now: the code of this run.
        headers: the headers of the checkpoint's runs, which name the code that each ran.
    """
    if not recoded:
        return
    example = recoded[0]
    codes = filter(None, map(Code.read, headers.values()))
    then = {pipeline_hash("", code.digest()): code for code in codes}.get(
        pipeline_hash("")[:4] + example.pipeline[4:]
    )
    if then is not None and then.python != now.python:
        # Each version of Python compiles in its own way, so the codes cannot be compared.

        return
    names = [] if then is None else now.differing(then)
    logger.warning(
        "%d of the completed sources went through other code than this run's%s, %s for one. "
        "Their output stays as it is. To process them again, their new output replacing the "
        'old, pass on_code_change="reprocess" to resumable_read; to keep it without this '
        'note, "ignore".',
        len(recoded),
        f" in {', '.join(names)}" if names else "",
        example.source_id,
    )


def warn_rows_again(output: Output, pending: SourceTable, snapshot: Snapshot) -> None:
    """Warn that the output keeps the rows that it has of ``pending`` sources, beside the new ones.

    They were completed before, and were reset or have changed since, or the pipeline has.
    """
    if output.replaces:
        return
    rows = snapshot.find(pending.digests)
    known = np.flatnonzero(rows >= 0)
    rows = rows[known]
    has_rows = snapshot.column("rows", rows) > 0
    has_rows &= snapshot.in_state(State.COMPLETED, State.RESET)[rows]
    again = known[has_rows]
    if len(again):
        logger.warning(
            "%s of this run, %s for one, had completed before, with rows in %s. They were reset, "
            "or they or the pipeline have changed. ray_resume cannot take their old rows away "
            "there: remove them, or each such source is there with its old and its new rows.",
            counted(len(again), "source"),
            pending.id(int(again[0])),
            output.uri,
        )
