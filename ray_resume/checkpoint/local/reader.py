"""Reads writers' files in a process of its own, which a damaged file may take down.

LMDB trusts the pages that it maps. A power cut may leave a page full of zeros, a failing disk one
full of noise, and such a page ends the process that reads it (by an assertion, or a signal). Here
it ends a child, and the parent raises an error that names the file. One child reads any number of
files; if it dies, another child goes on with the next file.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_resume.checkpoint.local.lmdb_file import read_writer_into
from ray_resume.errors import CheckpointError

if TYPE_CHECKING:
    from ray_resume.core.record_log import RecordLog

__all__ = ["Reading", "read_writers"]

# A damaged file could also make LMDB walk in circles. No sound file takes so long.
_TIMEOUT_S = 600

_SIGNS_OF_DAMAGE = {
    signal.SIGABRT,
    signal.SIGALRM,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSEGV,
}

# The child imports the same ray_resume as its parent.
_CHILD = (
    "import marshal, sys\n"
    "path, files = marshal.load(sys.stdin.buffer)\n"
    "sys.path[:] = path\n"
    "from ray_resume.checkpoint.local.reader import _serve\n"
    "_serve(files)\n"
)


@dataclass(frozen=True)
class Reading:
    """One writer's file as it was read: its header and records, or why it cannot be read."""

    run_id: str
    path: Path | str
    header: Mapping[str, Any]
    records: RecordLog
    error: CheckpointError | None = None


def read_writers(files: Mapping[str, tuple[Path, bool]]) -> Iterator[Reading]:
    """Read ``{run id: (path, live)}`` in that order; see :func:`.lmdb_file.read_writer_into`.

    A file that cannot be read raises nothing, and does not keep the others from being read.
    """
    rest = [(run_id, os.fspath(path), live) for run_id, (path, live) in files.items()]
    while rest:
        for reading in _read_in_child(rest):
            rest.pop(0)
            yield reading


def _read_in_child(files: list[tuple[str, str, bool]]) -> Iterator[Reading]:
    """Read ``files`` up to and including the first that takes the child down."""
    # The child has a session of its own, so that Ctrl-C reaches the parent only, which ends it.
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                marshal.dump(([str(path) for path in sys.path], files), child.stdin)
                child.stdin.close()
            # They take as long to load as the child, which needs no pyarrow, takes to start. Arrow
            # loads its functions when a record is first looked at.
            import pyarrow.compute  # noqa: F401

            from ray_resume.core.record_log import RecordLog

            for run_id, path, _ in list(files):
                header: Mapping[str, Any] = {}
                log = RecordLog()
                try:
                    while (part := marshal.load(child.stdout)) is not None:
                        kind, content = part
                        if kind == "header":
                            header = content
                        elif kind == "error":
                            raise CheckpointError(content)
                        else:
                            log.append(content)
                except CheckpointError as error:
                    _skip_rest(child.stdout, part)
                    yield Reading(run_id, Path(path), {}, RecordLog(), _named(error, path))
                except EOFError:
                    yield Reading(run_id, Path(path), {}, RecordLog(), _fatal(path, child))
                    return
                else:
                    yield Reading(run_id, Path(path), header, log)
        finally:
            child.kill()


def _skip_rest(stream: Any, part: tuple[str, Any] | None) -> None:
    """Read on to the end of a file that has turned out to be damaged."""
    while part is not None and part[0] != "error":
        part = marshal.load(stream)


def _named(error: CheckpointError, path: str) -> CheckpointError:
    if path in str(error):
        return error
    return CheckpointError(
        f"The checkpoint file {path} cannot be read: {error}. It is damaged: restore it from a "
        "copy, or start over with an empty checkpoint and an empty output folder."
    )


def _fatal(path: str, child: subprocess.Popen[bytes]) -> CheckpointError:
    assert child.stderr is not None
    last = child.stderr.read().decode(errors="replace").strip().splitlines()[-1:]
    code = child.wait()
    if -code in _SIGNS_OF_DAMAGE:
        how = ", ".join([signal.Signals(-code).name, *last])
        return CheckpointError(
            f"The checkpoint file {path} cannot be read: the process that read it died ({how}). "
            "It is damaged: restore it from a copy, or start over with an empty checkpoint and an "
            "empty output folder."
        )
    how = ", ".join([f"exit code {code}" if code >= 0 else f"signal {-code}", *last])
    return CheckpointError(
        f"The checkpoint file {path} could not be read: the process that read it was ended "
        f"({how}). The file may be sound; was the machine out of memory? Try again."
    )


def _serve(files: list[tuple[str, str, bool]]) -> None:
    """Be the child: send each file's header, the blocks of its records, and None or an error."""
    out = sys.stdout.buffer

    def send(part: tuple[str, Any] | None) -> None:
        marshal.dump(part, out)

    for _, path, live in files:
        signal.alarm(_TIMEOUT_S)
        try:
            read_writer_into(
                Path(path),
                lambda header: send(("header", header)),
                lambda block: send(("records", block)),
                live=live,
            )
        except CheckpointError as error:
            send(("error", str(error)))
        except Exception as error:
            send(("error", f"The checkpoint file {path} cannot be read: {error!r}."))
        else:
            send(None)
        out.flush()
