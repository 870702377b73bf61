"""The ``ray-resume`` command: what is done, what failed and why, what to type next.

Does not load Ray. All that a command does is a method of :class:`Checkpoint`; this module parses
arguments and prints results, `console` has the lines that people read.

Exit codes: 0 done; 1 the command failed, the check found damage, or the user said no; 2 the command
is wrong, or needs an answer and has no terminal to ask on; 3 sources are left, and the option
``--fail-if-incomplete`` is given; 130 interrupted; 141 the reader of the output is gone. An error
is one line on standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import click
from typing_extensions import override

from ray_resume import __version__
from ray_resume.checkpoint.check_report import plain
from ray_resume.checkpoint.checkpoint import Checkpoint
from ray_resume.checkpoint.selection import chooser, matching_ids
from ray_resume.console import RUNS_HEADER, run_row, source_lines, status_lines, table_lines
from ray_resume.core.wording import counted
from ray_resume.errors import ResumeError
from ray_resume.files import public_uri

__all__ = ["main"]

F = TypeVar("F", bound=Callable[..., Any])

_DONE, _FAILED, _USAGE, _INCOMPLETE, _INTERRUPTED, _NO_READER = 0, 1, 2, 3, 130, 141
_STATES = ("completed", "failed", "quarantined")
_CLEAR = "\x1b[H\x1b[2J"
_COMPLETION = "_RAY_RESUME_COMPLETE"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with ``arguments`` (those of the process by default); return its exit code.

    Raises:
        SystemExit: the arguments are wrong, or ask for help.
    """
    if instruction := os.environ.get(_COMPLETION):
        from click.shell_completion import shell_complete

        return shell_complete(_command, {}, _command.name or "", _COMPLETION, instruction)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            with _command.make_context(_command.name, words) as context:
                code: int = _command.invoke(context)
        except click.UsageError as error:
            path = _command.name if error.ctx is None else error.ctx.command_path
            _fail(f"{error.format_message()} See {path} --help.")
            raise SystemExit(_USAGE) from None
        except click.exceptions.Exit as over:
            raise SystemExit(over.exit_code) from None
        except BrokenPipeError:
            raise
        except (ResumeError, OSError) as error:
            code = _fail(str(error))
        sys.stdout.flush()
    except BrokenPipeError:
        # Buffered output would fail again when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NO_READER
    except KeyboardInterrupt:
        return _INTERRUPTED
    return code


class _Commands(click.Group):
    """The commands in the order of this module, the most used first."""

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    "ray-resume",
    cls=_Commands,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
A job died, and you wonder what is left:
  ray-resume status CHECKPOINT                     what is done, and what to type next
  ray-resume runs CHECKPOINT                       who worked on it, and how each run ended
  ray-resume sources CHECKPOINT --state failed     why sources failed
  ray-resume report CHECKPOINT            all of it, as a page to send around
Once the cause is mended:
  ray-resume reset CHECKPOINT --state quarantined  try again what failed too often
  ray-resume reset CHECKPOINT --dead-letters       try again what has rows in dead letters
  (your script once more)                          it goes on with what is left

\b
CHECKPOINT is a directory, or a URI such as s3://bucket/checkpoint.

\b
Completion of commands and options, for bash (or zsh, fish):
  eval "$(_RAY_RESUME_COMPLETE=bash_source ray-resume)"
Put this line into ~/.bashrc to have it in each shell.

\b
Exit codes: 0 done, 1 failed, damaged or declined, 2 wrong usage,
3 sources are left (status --fail-if-incomplete), 130 interrupted.""",
)
@click.version_option(__version__, prog_name="ray-resume", message="%(prog)s %(version)s")
def _command() -> None:
    """Look at a checkpoint of ray_resume, and steer the next run by hand."""


def _add(epilog: str) -> Callable[[F], click.Command]:
    """Make a command of a function that takes a checkpoint first, and returns an exit code."""

    def add(function: F) -> click.Command:
        name = function.__name__.strip("_")
        place = click.argument("checkpoint", metavar="CHECKPOINT", type=click.Path())
        return _command.command(name, epilog="\b\n" + epilog)(place(function))

    return add


def _as_json(about: str) -> Callable[[F], F]:
    return click.option("--json", "as_json", is_flag=True, help=about)


def _ids(function: F) -> F:
    """Add the options that select sources by their ids."""
    source = click.option("--source", multiple=True, metavar="ID", help="This one (repeatable).")
    pattern = click.option(
        "--glob",
        multiple=True,
        metavar="PATTERN",
        help="Those with such an id (repeatable): * is any text, / included.",
    )
    return source(pattern(function))


@_add(
    """Examples:
  ray-resume status ckpt
  ray-resume status ckpt --watch                the same every two seconds
  ray-resume status ckpt --fail-if-incomplete   in a job script: exit code 3 if sources are left"""
)
@_as_json("One JSON object (one a look).")
@click.option("--watch", is_flag=True, help="Look again until no run is at work.")
@click.option(
    "--interval",
    type=click.FloatRange(0, 86400, min_open=True, max_open=True),
    default=2.0,
    metavar="S",
    help="Seconds between looks (2).",
)
@click.option(
    "--fail-if-incomplete",
    is_flag=True,
    help="Exit with 3 if any source is not completed, or none was listed yet.",
)
def _status(
    checkpoint: str, as_json: bool, watch: bool, interval: float, fail_if_incomplete: bool
) -> int:
    """Show what is done, what failed, and what to type next."""
    opened = Checkpoint(checkpoint)
    clear = _CLEAR if watch and sys.stdout.isatty() and not as_json else ""
    while True:
        status = opened.status()
        if as_json:
            _print(_json(dict(status)))
        else:
            # A screen that is refreshed shows how old it is.
            leave = ", Ctrl-C to leave" if status.live else ""
            stamp = [f"{time.strftime('%H:%M:%S')}{leave}"] if watch else []
            _print(clear + "\n".join([*status_lines(status, public_uri(checkpoint)), *stamp]))
        if not (watch and status.live):
            return _INCOMPLETE if fail_if_incomplete and not status.complete else _DONE
        sys.stdout.flush()
        time.sleep(interval)


@_add(
    """Examples:
  ray-resume sources ckpt --state failed
  ray-resume sources ckpt --glob 'raw/2026-11-*'
  ray-resume sources ckpt --dead-letters        those with rows that a UDF refused"""
)
@click.option("--state", type=click.Choice(_STATES), help="Only those in this state.")
@click.option("--dead-letters", is_flag=True, help="Only those with rows in dead letters.")
@_ids
@_as_json("A JSON array of objects.")
def _sources(
    checkpoint: str,
    state: str | None,
    dead_letters: bool,
    source: Sequence[str],
    glob: Sequence[str],
    as_json: bool,
) -> int:
    """List the sources on record, what failed first."""
    is_chosen = chooser(source, glob)
    opened = Checkpoint(checkpoint)
    if as_json:
        records = [
            record
            for record in opened.sources(state)
            if is_chosen(record.source_id) and (record.rows_dead_lettered or not dead_letters)
        ]
        _print_list(_json(asdict(one)) for one in sorted(records, key=lambda one: one.source_id))
        return _DONE
    for line in source_lines(opened.to_arrow(), state, is_chosen, dead_letters=dead_letters):
        _print(line)
    return _DONE


@_add(
    """Example:
  ray-resume runs ckpt

A run that was killed has its last sign of life as its end."""
)
@_as_json("A JSON array of objects.")
def _runs(checkpoint: str, as_json: bool) -> int:
    """List the runs, the oldest first, and how each ended."""
    runs = list(Checkpoint(checkpoint).runs())
    if as_json:
        _print_list(_json(asdict(run)) for run in runs)
    elif runs:
        for line in table_lines([RUNS_HEADER, *map(run_row, runs)]):
            _print(line)
    else:
        _print("No run is on record.")
    return _DONE


@_add(
    """Example:
  ray-resume report ckpt -o report.html         then open it in a browser

The page needs no network. It takes `pip install 'ray-resume[report]'` to make one."""
)
@click.option(
    "-o",
    "--output",
    default="report.html",
    metavar="FILE",
    type=click.Path(),
    help="Where to write it (report.html); a file that is there is replaced.",
)
def _report(checkpoint: str, output: str) -> int:
    """Write an HTML page: progress, runs, crashes, failures, sizes."""
    path = Checkpoint(checkpoint).report(output)
    _print(f"The report is in {plain(path)}.")
    return _DONE


@_add(
    """Examples:
  ray-resume files ckpt
  ray-resume files ckpt -0 | xargs -0 ls -l     paths may have any characters"""
)
@_as_json("A JSON array of strings.")
@click.option("-0", "--null", is_flag=True, help="End each path with a NUL.")
def _files(checkpoint: str, as_json: bool, null: bool) -> int:
    """List the clean output files: each of their rows counts."""
    if as_json and null:
        raise click.UsageError("--json and --null exclude each other.")
    files = Checkpoint(checkpoint).files()
    if as_json:
        _print_list(map(_json, files))
        return _DONE
    end = "\0" if null else "\n"
    broken = [file for file in files if end in file]
    if broken:
        return _fail(
            f"{counted(len(broken), 'path')} would not be one line each, {broken[0]!r} for one. "
            "Use --null or --json."
        )
    if sys.stdout.isatty():
        # Like `ls`: the terminal gets no control characters.
        _print("\n".join(map(plain, files)))
        return _DONE
    # As bytes, because a path need not be valid text.
    sys.stdout.flush()
    for file in files:
        sys.stdout.buffer.write(os.fsencode(f"{file}{end}"))
    return _DONE


@_add(
    """Example:
  ray-resume parts ckpt | grep FILE             whose rows are in a file"""
)
@_ids
@_as_json("A JSON array of objects.")
def _parts(checkpoint: str, source: Sequence[str], glob: Sequence[str], as_json: bool) -> int:
    """List where rows are: file, first row, rows, source."""
    is_chosen = chooser(source, glob)
    parts = (part for part in Checkpoint(checkpoint).parts() if is_chosen(part.source_id))
    if as_json:
        _print_list(_json(part._asdict()) for part in parts)
        return _DONE
    for part in parts:
        _print(f"{plain(part.file)}\t{part.first_row}\t{part.rows}\t{plain(part.source_id)}")
    return _DONE


@_add(
    """Examples:
  ray-resume reset ckpt --state failed          try again what failed
  ray-resume reset ckpt --dead-letters          and what has rows in dead letters
  ray-resume reset ckpt --glob 'raw/2026-11-*'
  ray-resume reset ckpt --version prompt-3      what went through this version of a UDF
  ray-resume reset ckpt --state all --yes       everything, without a question

Output stays until the next run has replaced it."""
)
@click.option("--state", type=click.Choice([*_STATES, "all"]), help="All in this state.")
@click.option("--dead-letters", is_flag=True, help="All with rows in dead letters.")
@click.option("--version", metavar="TEXT", help="All of this version= of a UDF.")
@_ids
@click.option("--yes", is_flag=True, help="Do not ask.")
def _reset(
    checkpoint: str,
    state: str | None,
    dead_letters: bool,
    version: str | None,
    source: Sequence[str],
    glob: Sequence[str],
    yes: bool,
) -> int:
    """Forget sources: the next run processes them again."""
    if [bool(state), dead_letters, version is not None, bool(source or glob)].count(True) != 1:
        raise click.UsageError(
            "Say which: one of --state, --dead-letters, --version, or --source and --glob."
        )
    opened = Checkpoint(checkpoint)
    ids: list[str] | None = None
    if source or glob:
        ids = list(dict.fromkeys([*source, *matching_ids(opened, glob)]))
        what = counted(len(ids), "source")
    elif version is not None:
        what = f"{counted(opened.status().versions.get(version, 0), 'completed source')} of "
        what += f"version {version!r}, and those of it that failed"
    elif dead_letters:
        what = f"{counted(opened.status().sources_dead_lettered, 'source')} with dead letters"
    else:
        status = opened.status()
        states = _STATES if state == "all" else (state,)
        which = "" if state == "all" else f"{state} "
        what = counted(sum(status[one] for one in states if one), f"{which}source")
    # Without a terminal, a user who names the sources need not confirm.
    has_named_all = bool(source) and not glob
    if not yes and (sys.stdin.isatty() or not has_named_all):
        if not sys.stdin.isatty():
            return _fail(f"This would forget {what}. Say so with --yes.", _USAGE)
        if not _agreed(f"Forget {what} of {opened.path}, to be processed again? [y/N] "):
            return _fail("Nothing was reset.")
    forgotten = opened.reset(ids, state=state, dead_letters=dead_letters, version=version)
    _print(
        f"{counted(forgotten, 'source')} forgotten. The next run processes what it lists of them."
    )
    return _DONE


@_add(
    """Example:
  mv out /data/out && ray-resume rebind ckpt /data/out"""
)
@click.argument("folder", metavar="NEW_FOLDER", type=click.Path())
def _rebind(checkpoint: str, folder: str) -> int:
    """Say that the output was moved to another folder."""
    files = Checkpoint(checkpoint).rebind(folder)
    _print(f"The output is in {public_uri(folder)} now, {counted(files, 'file')}.")
    return _DONE


@_add("Runs do so by themselves once there are many files.")
def _compact(checkpoint: str) -> int:
    """Merge the checkpoint's files into one: runs start quicker."""
    merged = Checkpoint(checkpoint).compact()
    _print(f"Merged {merged:,} files of runs into one." if merged else "There is nothing to merge.")
    return _DONE


@_add(
    "It removes leftovers, too. The next run does the same; use it to read the output before that."
)
def _tidy(checkpoint: str) -> int:
    """Rewrite output files with rows that do not count."""
    rewritten = Checkpoint(checkpoint).tidy()
    _print(f"{counted(rewritten, 'file')} rewritten." if rewritten else "The output is tidy.")
    return _DONE


@_add("Exit code 1 if anything is damaged. Changes nothing, and may run beside a run at work.")
@_as_json("One JSON object.")
def _check(checkpoint: str, as_json: bool) -> int:
    """Prove the checkpoint sound, or name what is damaged."""
    report = Checkpoint(checkpoint).check()
    _print(_json({"ok": report.ok, **asdict(report)}) if as_json else str(report))
    return _DONE if report.ok else _FAILED


def _agreed(question: str) -> bool:
    sys.stdout.flush()
    sys.stderr.write(question)
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _print(text: str) -> None:
    # A terminal that cannot show a character gets an escape.
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def _json(value: Any) -> str:
    # JSON escapes every control character but this one.
    return json.dumps(value).replace("\x7f", "\\u007f")


def _print_list(elements: Iterable[str]) -> None:
    """Print a JSON array with an element on each line."""
    _print("[" + ",\n ".join(elements) + "]")


def _fail(message: str, code: int = _FAILED) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"ray-resume: {plain(' '.join(message.split()))}\n")
    return code
