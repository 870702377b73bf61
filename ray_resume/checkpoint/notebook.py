"""A checkpoint's status as HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ray_resume.checkpoint.moments import moment
from ray_resume.core.markup import bar, panel, table
from ray_resume.core.wording import counted, duration

__all__ = ["status_html"]

_STATES = ("completed", "quarantined", "failed", "pending")
_COMMON_ERRORS = 5


def status_html(status: Mapping[str, Any], checkpoint: str | None = None) -> str:
    """Return HTML of a `CheckpointStatus`.

    Args:
        checkpoint: its path, if that is to be shown.
    """
    share = f" ({100 * status['completed'] / status['total']:.1f} %)" if status["total"] else ""
    title = f"{status['completed']:,} of {counted(status['total'], 'source')} completed{share}"
    facts = [("Checkpoint", checkpoint)] if checkpoint else []
    errors = [(f"{n:,}", error) for error, n in list(status["errors"].items())[:_COMMON_ERRORS]]
    return panel(
        title,
        bar((state, status[state]) for state in _STATES),
        table([*facts, *_facts(status)]),
        table(errors, ("sources", "most common errors")),
    )


def _facts(status: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for state in ("pending", "failed", "quarantined"):
        if status[state]:
            yield state.capitalize(), counted(status[state], "source")
    if status["sink"] is not None:
        rows, files = counted(status["rows"], "row"), counted(status["files"], "file")
        yield "Output", f"{rows} in {files}, {status['sink']}"
    if status["files_missing"]:
        yield "Files that are gone", f"{status['files_missing']:,}"
    if status["unclean"]:
        yield "Files with rows that do not count", f"{status['unclean']:,}"
    if status["unsettled"]:
        yield "Publications not confirmed", f"{status['unsettled']:,}"
    if status["rows_dead_lettered"]:
        sources = counted(status["sources_dead_lettered"], "source")
        yield "Dead letters", f"{counted(status['rows_dead_lettered'], 'row')} of {sources}"
    if status["last_completed_at"] is not None:
        yield "Last commit", moment(status["last_completed_at"])
    for run in status["runs"]:
        where = f"run {run['run_id']}, host {run['host']}, pid {run['pid']}"
        yield ("At work" if run["alive"] else "Killed"), f"{where}, {moment(run['started_at'])}"
    if status["rows_at_risk"]:
        yield "Rows at risk", f"{status['rows_at_risk']:,}"
    if status["seconds_left"] is not None:
        yield "Time left", f"about {duration(status['seconds_left'])}"
    last = status["last_run"]
    if last is not None:
        when = moment(last["started_at"] if last["ended_at"] is None else last["ended_at"])
        error = f": {last['error'].strip()}" if last["error"] else ""
        yield "Last run", f"{last['outcome']} {when}, after {duration(last['duration_s'])}{error}"
