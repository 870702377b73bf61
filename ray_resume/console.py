"""Text of the ``ray-resume`` command: what a person reads of a checkpoint, line by line.

Every id, error and path is hostile: `plain` escapes what would break a line or a terminal.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ray_resume.checkpoint.check_report import plain
from ray_resume.checkpoint.history import RunRecord
from ray_resume.checkpoint.moments import moment, time_text
from ray_resume.checkpoint.status import CheckpointStatus, last_line
from ray_resume.core.wording import counted, duration

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["RUNS_HEADER", "run_row", "source_lines", "status_lines", "table_lines"]

_BAR_CELLS = 40
# From the left: completed, quarantined, failed, and what is left.
_BAR_SIGNS = ("#", "q", "!", ".")
_COMMON_ERRORS = 3
_LINE_CHARS = 200

RUNS_HEADER = ("started", "outcome", "took", "completed", "failed", "rows", "run", "host", "error")
"""The columns of the list of runs."""


def status_lines(status: CheckpointStatus, path: str) -> list[str]:
    """Return the lines of a status, the most important first.

    Args:
        path: how the user has named the checkpoint, for commands to type.
    """
    lines = [_counts_line(status), *_bar_lines(status)]
    if status.sink is not None:
        output = f"{counted(status.rows, 'row')} in {counted(status.files, 'file')}"
        lines.append(f"Output: {output}, {plain(status.sink)}")
    if status.files_missing:
        lines.append(
            f"{_are(status.files_missing, 'listed file')} gone from that folder: the next run "
            "refuses to start until they are back, or their sources are reset"
        )
    if status.unclean:
        lines.append(
            f"{counted(status.unclean, 'file')} of these also have rows that do not count, and "
            "are not listed by `files` until the next run has rewritten them"
        )
    if status.rows_dead_lettered:
        lines.append(
            f"{_are(status.rows_dead_lettered, 'row')} in dead letters, of "
            f"{counted(status.sources_dead_lettered, 'source')}"
        )
    if status.versions:
        of_each = (f"{n:,} of {plain(version)}" for version, n in status.versions.items())
        lines.append(f"Versions of completed sources: {', '.join(of_each)}")
    if status.unsettled:
        lines.append(
            f"{_are(status.unsettled, 'publication')} not confirmed, since a run died meanwhile: "
            "the next run asks the table, and no row is lost or doubled"
        )
    if status.last_completed_at is not None:
        lines.append(f"Last commit: {moment(status.last_completed_at)}")
    lines += [_owner_line(run) for run in status.runs]
    lines += _pace_lines(status)
    if not status.live:
        lines += _last_run_lines(status)
        lines.append("No run is at work.")
    if status.errors:
        lines.append("Most common errors:")
        errors = list(status.errors.items())[:_COMMON_ERRORS]
        lines += [f"  {n:,} x {_short(error)}" for error, n in errors]
    return lines + _next_steps(status, shlex.quote(path))


def _counts_line(status: CheckpointStatus) -> str:
    share = f" ({100 * status.completed / status.total:.1f} %)" if status.total else ""
    counts = [
        f"{status.completed:,} of {counted(status.total, 'source')} completed{share}",
        *(f"{n:,} {word}" for word in ("pending", "failed", "quarantined") if (n := status[word])),
    ]
    return ", ".join(counts)


def _bar_lines(status: CheckpointStatus) -> list[str]:
    """Return a bar: a state that has any source has a cell, and only what is done is full."""
    if not status.total:
        return []
    parts = [status.completed, status.quarantined, status.failed]
    cells = [max(part > 0, part * _BAR_CELLS // status.total) for part in parts]
    # Rounding up the small parts must not make the bar longer.
    cells[0] = min(cells[0], _BAR_CELLS - sum(cells[1:]) - (status.pending > 0))
    rest = _BAR_CELLS - sum(cells)
    if not status.pending:
        cells[0] += rest
        rest = 0
    filled = [sign * n for sign, n in zip(_BAR_SIGNS, [*cells, rest], strict=True)]
    return [f"[{''.join(filled)}]"]


def _owner_line(run: dict[str, Any]) -> str:
    shard = f"{run['shard']}, " if run["shard"] else ""
    where = f"({shard}host {run['host']}, pid {run['pid']}), started {moment(run['started_at'])}"
    return plain(f"{'At work' if run['alive'] else 'Killed'}: run {run['run_id']} {where}")


def _pace_lines(status: CheckpointStatus) -> Iterator[str]:
    rate = status.sources_per_s
    if rate is None:
        return
    pace = f"{rate:,.1f} sources a second" if rate >= 1 else f"{60 * rate:,.1f} sources a minute"
    left = "" if status.seconds_left is None else f", about {duration(status.seconds_left)} left"
    risk = f", {counted(status.rows_at_risk, 'row')} at risk" if status.rows_at_risk else ""
    yield (f"Pace: {pace}{left}" if rate else "Pace: no source was completed lately") + risk


def _last_run_lines(status: CheckpointStatus) -> Iterator[str]:
    """Say how the last run ended, unless its lease says already that it was killed."""
    run = status.last_run
    if run is None or any(run["run_id"] == killed["run_id"] for killed in status.runs):
        return
    when = moment(run["ended_at"] or run["started_at"])
    line = f"Last run: {run['outcome']} {when}, after {duration(run['duration_s'])}"
    if run["outcome"] == "failed" and run["error"]:
        line += f": {_short(run['error'])}"
    yield plain(line)


def _next_steps(status: CheckpointStatus, path: str) -> list[str]:
    steps: list[tuple[str, str]] = []
    if status.live:
        steps.append((f"ray-resume status {path} --watch", "to follow it"))
    elif status.total == 0:
        steps.append(("your script", "nothing was run yet"))
    elif status.pending or status.failed:
        n = status.pending + status.failed
        steps.append(("your script once more", f"it goes on with {counted(n, 'source')}"))
    if status.failed or status.quarantined:
        state = "failed" if status.failed else "quarantined"
        steps.append((f"ray-resume sources {path} --state {state}", "which they are, and why"))
    if status.quarantined and not status.live:
        steps.append(
            (f"ray-resume reset {path} --state quarantined", "to try them again, once mended")
        )
    if status.rows_dead_lettered:
        steps.append((f"ray-resume sources {path} --dead-letters", "whose rows are dead letters"))
        if not status.live:
            steps.append(
                (f"ray-resume reset {path} --dead-letters", "to try them again, once mended")
            )
    if status.unclean and not status.live:
        steps.append((f"ray-resume tidy {path}", "to rewrite these files now, without a run"))
    if status.files_missing:
        steps.append((f"ray-resume check {path}", "which files are gone, and what to do"))
    elif any(not run["alive"] for run in status.runs):
        steps.append((f"ray-resume check {path}", "to prove it sound after the crash"))
    if not steps:
        steps.append((f"ray-resume files {path}", "all is done; this lists the output"))
    width = max(len(command) for command, _ in steps)
    return ["Next:", *(f"  {command:{width}}  # {why}" for command, why in steps)]


def source_lines(
    sources: pa.Table,
    state: str | None,
    is_chosen: Callable[[str], bool],
    *,
    dead_letters: bool = False,
) -> Iterator[str]:
    """Yield a line for each source: what failed first, then by id.

    Args:
        sources: all on record (see `source_table`).
        state: only those in this state.
        is_chosen: tells by its id whether a source is wanted.
        dead_letters: only those with rows in dead letters.
    """
    import pyarrow.compute as pc

    names = ("source_id", "state", "rows", "error", "failed_runs", "rows_dead_lettered")
    columns = [sources.column(name).to_pylist() for name in names]
    columns.append(pc.list_value_length(sources.column("files")).to_pylist())
    found = sorted(zip(*columns, strict=True), key=lambda row: (_rank(row[1], row[5]), row[0]))
    for source_id, its_state, rows, error, failed_runs, dead_rows, files in found:
        if state not in (None, its_state) or not is_chosen(source_id):
            continue
        if dead_letters and not dead_rows:
            continue
        about = [its_state, plain(source_id)]
        if its_state == "completed":
            about.append(f"{counted(rows, 'row')} in {counted(files, 'file')}")
        else:
            about.append(f"failed in {counted(failed_runs, 'run')}")
            about.append(plain(last_line(error or "no error on record")))
        if dead_rows:
            about.append(f"{counted(dead_rows, 'row')} in dead letters")
        yield "\t".join(about)


def _rank(state: str, dead_rows: int) -> int:
    if state == "completed":
        return 2 if dead_rows else 3
    return ("failed", "quarantined").index(state)


def run_row(run: RunRecord) -> tuple[str, ...]:
    """Return what `RUNS_HEADER` says of a run."""
    return (
        time_text(run.started_at),
        run.outcome,
        duration(run.duration_s),
        f"{run.sources_completed:,}",
        f"{run.sources_failed:,}",
        f"{run.rows_written:,}",
        plain(run.run_id),
        plain(run.host + (f" ({run.shard})" if run.shard else "")),
        _short(run.error or ""),
    )


def table_lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows as lines with columns of equal width; numbers stand on the right."""
    formats = []
    for _, *cells in zip(*rows, strict=True):
        are_numbers = all(cell.replace(",", "").isdigit() for cell in cells)
        formats.append(">" if are_numbers else "<")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{c:{f}{w}}" for c, f, w in zip(row, formats, widths, strict=True)]
        yield "  ".join(cells).rstrip()


def _are(number: int, noun: str) -> str:
    return f"{counted(number, noun)} {'is' if number == 1 else 'are'}"


def _short(error: str) -> str:
    line = plain(last_line(error))
    return line if len(line) <= _LINE_CHARS else f"{line[: _LINE_CHARS - 1]}…"
