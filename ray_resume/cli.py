"""The ``ray-resume`` command: what is done, what failed and why, what to type next.

Does not load Ray. All that a command does is a method of :class:`Checkpoint`; this module parses
arguments and prints results.

Exit codes: 0 done; 1 the command failed, the check found damage, or the user said no; 2 the command
is wrong, or needs an answer and has no terminal to ask on; 3 sources are left, and the option
``--fail-if-incomplete`` is given; 130 interrupted; 141 the reader of the output is gone. An error
is one line on standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from typing_extensions import override

from ray_resume import __version__
from ray_resume.checkpoint.checkpoint import Checkpoint
from ray_resume.checkpoint.report import plain
from ray_resume.checkpoint.status import CheckpointStatus, last_line
from ray_resume.errors import ResumeError
from ray_resume.files import public_uri

__all__ = ["main"]

_DONE, _FAILED, _USAGE, _INCOMPLETE, _INTERRUPTED, _NO_READER = 0, 1, 2, 3, 130, 141
_STATES = ("completed", "failed", "quarantined")
_CLEAR = "\x1b[H\x1b[2J"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with ``arguments`` (those of the process by default); return its exit code.

    Raises:
        SystemExit: the arguments are wrong, or ask for help.
    """
    options = _parser().parse_args(arguments)
    try:
        try:
            code: int = options.command(options)
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


def _status(options: argparse.Namespace) -> int:
    checkpoint = Checkpoint(options.checkpoint)
    clear = _CLEAR if options.watch and sys.stdout.isatty() and not options.json else ""
    while True:
        status = checkpoint.status()
        if options.json:
            _print(_json(dict(status)))
        else:
            lines = _status_lines(status, public_uri(options.checkpoint))
            # A screen that is refreshed shows how old it is.
            stamp = [f"{time.strftime('%H:%M:%S')}, Ctrl-C to leave"] if options.watch else []
            _print(clear + "\n".join([*lines, *stamp]))
        if not (options.watch and status.live):
            return _INCOMPLETE if options.fail_if_incomplete and not status.complete else _DONE
        sys.stdout.flush()
        time.sleep(options.interval)


def _sources(options: argparse.Namespace) -> int:
    sources = sorted(
        Checkpoint(options.checkpoint).sources(options.state), key=lambda source: source.source_id
    )
    if options.json:
        _print_list(_json(asdict(source)) for source in sources)
        return _DONE
    for source in sources:
        about = [source.state, plain(source.source_id)]
        if source.state == "completed":
            about.append(f"{source.rows} rows in {_count(len(source.files), 'file')}")
        else:
            about.append(f"failed in {_count(source.failed_runs, 'run')}")
            about.append(plain(last_line(source.error or "no error on record")))
        _print("\t".join(about))
    return _DONE


def _files(options: argparse.Namespace) -> int:
    files = Checkpoint(options.checkpoint).files()
    if options.json:
        _print_list(map(_json, files))
        return _DONE
    end = "\0" if options.null else "\n"
    broken = [file for file in files if end in file]
    if broken:
        return _fail(
            f"{_count(len(broken), 'path')} would not be one line each, {broken[0]!r} for one. "
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


def _reset(options: argparse.Namespace) -> int:
    checkpoint = Checkpoint(options.checkpoint)
    what = _count(len(set(options.source or ())), "source")
    if options.state:
        status = checkpoint.status()
        states = _STATES if options.state == "all" else (options.state,)
        which = "" if options.state == "all" else f"{options.state} "
        what = _count(sum(status[state] for state in states), f"{which}source")
    # Without a terminal, a user who names the sources need not confirm.
    if not options.yes and (sys.stdin.isatty() or options.state):
        if not sys.stdin.isatty():
            return _fail(f"This would forget {what}. Say so with --yes.", _USAGE)
        question = f"Forget {what} of {checkpoint.path}, to be processed again? [y/N] "
        if not _agreed(question):
            return _fail("Nothing was reset.")
    forgotten = checkpoint.reset(options.source, state=options.state)
    _print(
        f"{_count(forgotten, 'source')} forgotten. The next run processes what it lists of them."
    )
    return _DONE


def _compact(options: argparse.Namespace) -> int:
    merged = Checkpoint(options.checkpoint).compact()
    _print(f"{merged} writers' files merged into one." if merged else "There is nothing to merge.")
    return _DONE


def _rebind(options: argparse.Namespace) -> int:
    files = Checkpoint(options.checkpoint).rebind(options.folder)
    _print(f"The output is in {public_uri(options.folder)} now, {_count(files, 'file')}.")
    return _DONE


def _parts(options: argparse.Namespace) -> int:
    parts = Checkpoint(options.checkpoint).parts()
    if options.json:
        _print_list(_json(part._asdict()) for part in parts)
        return _DONE
    for part in parts:
        _print(f"{plain(part.file)}\t{part.first_row}\t{part.rows}\t{plain(part.source_id)}")
    return _DONE


def _tidy(options: argparse.Namespace) -> int:
    rewritten = Checkpoint(options.checkpoint).tidy()
    _print(f"{_count(rewritten, 'file')} rewritten." if rewritten else "The output is tidy.")
    return _DONE


def _check(options: argparse.Namespace) -> int:
    report = Checkpoint(options.checkpoint).check()
    _print(_json({"ok": report.ok, **asdict(report)}) if options.json else str(report))
    return _DONE if report.ok else _FAILED


def _status_lines(status: CheckpointStatus, path: str) -> list[str]:
    """Return the lines of a status, the most important first."""
    share = f" ({100 * status.completed / status.total:.1f} %)" if status.total else ""
    counts = [
        f"{status.completed} of {_count(status.total, 'source')} completed{share}",
        *(f"{n} {word}" for word in ("pending", "failed", "quarantined") if (n := status[word])),
    ]
    lines = [", ".join(counts)]
    if status.sink is not None:
        lines.append(
            f"Output: {status.rows} rows in {_count(status.files, 'file')}, {plain(status.sink)}"
        )
    if status.unclean:
        lines.append(
            f"{_count(status.unclean, 'file')} of these also have rows that do not count, and "
            "are not listed by `files` until the next run has rewritten them"
        )
    if status.last_completed_at is not None:
        lines.append(f"Last commit: {_moment(status.last_completed_at)}")
    lines += [_run_line(run) for run in status.runs]
    if not status.live:
        lines.append("No run is at work.")
    if status.errors:
        lines.append("Most common errors:")
        lines += [f"  {n} x {plain(error)}" for error, n in list(status.errors.items())[:3]]
    return lines + _next_steps(status, shlex.quote(path))


def _run_line(run: dict[str, Any]) -> str:
    shard = f"{run['shard']}, " if run["shard"] else ""
    where = f"({shard}host {run['host']}, pid {run['pid']}), started {_moment(run['started_at'])}"
    return plain(f"{'At work' if run['alive'] else 'Killed'}: run {run['run_id']} {where}")


def _next_steps(status: CheckpointStatus, path: str) -> list[str]:
    steps = []
    if status.live:
        steps.append((f"ray-resume status {path} --watch", "to follow it"))
    elif status.total == 0:
        steps.append(("your script", "nothing was run yet"))
    elif status.pending or status.failed:
        n = status.pending + status.failed
        steps.append(("your script once more", f"it goes on with {_count(n, 'source')}"))
    if status.failed or status.quarantined:
        state = "failed" if status.failed else "quarantined"
        steps.append((f"ray-resume sources {path} --state {state}", "which they are, and why"))
    if status.quarantined and not status.live:
        steps.append(
            (f"ray-resume reset {path} --state quarantined", "to try them again, once mended")
        )
    if status.unclean and not status.live:
        steps.append((f"ray-resume tidy {path}", "to rewrite these files now, without a run"))
    if any(not run["alive"] for run in status.runs):
        steps.append((f"ray-resume check {path}", "to prove it sound after the crash"))
    if not steps:
        steps.append((f"ray-resume files {path}", "all is done; this lists the output"))
    width = max(len(command) for command, _ in steps)
    return ["Next:", *(f"  {command:{width}}  # {why}" for command, why in steps)]


def _moment(at: float) -> str:
    """Return a time, and how long ago it was, with the time zone: logs may have another."""
    if not 0 <= at < 1e11:
        return f"at an impossible time, {at}"
    formatted = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(at))
    return f"{_age(time.time() - at)} ago, {formatted}"


def _age(seconds: float) -> str:
    whole = max(0, int(seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if whole >= length:
            return f"{whole / length:.1f} {unit}"
    return f"{whole} s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


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


class _Parser(argparse.ArgumentParser):
    """A parser that reports wrong arguments in one line."""

    @override
    def error(self, message: str) -> NoReturn:
        _fail(f"{message}. See {self.prog} --help.")
        raise SystemExit(_USAGE)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ray-resume",
        description="Look at a checkpoint of ray_resume, and steer the next run by hand.",
        epilog="exit codes: 0 done, 1 failed, damaged or declined, 2 wrong usage, 3 sources "
        "are left (--fail-if-incomplete), 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"ray-resume {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, function: Callable[[argparse.Namespace], int], about: str) -> _Parser:
        command = commands.add_parser(
            name, help=about, description=f"{about.capitalize()}.", allow_abbrev=False
        )
        command.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint's directory")
        command.set_defaults(command=function)
        return command

    status = add("status", _status, "what is done, what failed and why, what to type next")
    status.add_argument("--json", action="store_true", help="one JSON object (one a look)")
    status.add_argument("--watch", action="store_true", help="look again until no run is at work")
    status.add_argument(
        "--fail-if-incomplete",
        action="store_true",
        help="exit with 3 if any source is not completed, or none was listed yet",
    )
    status.add_argument(
        "--interval", type=_seconds, default=2.0, metavar="S", help="seconds between looks (2)"
    )

    sources = add("sources", _sources, "list the sources on record, one a line")
    sources.add_argument("--state", choices=_STATES, help="only those in this state")
    sources.add_argument("--json", action="store_true", help="a JSON array of objects")

    files = add("files", _files, "list the clean output files, one path a line")
    form = files.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a JSON array of strings")
    form.add_argument("-0", "--null", action="store_true", help="end each path with a NUL")

    reset = add("reset", _reset, "forget sources, so that the next run processes them again")
    which = reset.add_mutually_exclusive_group(required=True)
    which.add_argument("--state", choices=(*_STATES, "all"), help="all in this state")
    which.add_argument("--source", action="append", metavar="ID", help="this one (repeatable)")
    reset.add_argument("--yes", action="store_true", help="do not ask")

    rebind = add("rebind", _rebind, "say that the output was moved to another folder")
    rebind.add_argument("folder", metavar="NEW_FOLDER", help="where all of its files are now")

    add("compact", _compact, "merge the writers' files into one")

    parts = add("parts", _parts, "list where each source's rows are: file, first row, rows, source")
    parts.add_argument("--json", action="store_true", help="a JSON array of objects")

    add("tidy", _tidy, "rewrite output files that have rows that do not count, remove leftovers")

    check = add("check", _check, "prove the checkpoint sound, or name what is damaged")
    check.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 86400:
        raise argparse.ArgumentTypeError(f"not a number of seconds: {text}")
    return seconds
