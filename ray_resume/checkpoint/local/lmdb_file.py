"""The store: one LMDB file per writer. The only import of lmdb.

A writer's file is called ``<run id>.mdb`` and appears under that name only as a valid store.
Records are added and superseded, never deleted. They stand in blocks (`records.encode`), whose
keys are their numbers in the file, so that they fill its pages from left to right: with random
keys, each commit would write most of the pages of a large file again. As long as the last block is
small, a commit replaces it by one that holds its records and the new ones: a run that commits one
record at a time writes few blocks.

Guarantees of :meth:`WriterFile.commit`: when it returns, the records survive the death of the
process and of the machine (LMDB with ``sync`` and ``metasync``, its defaults); if it raises or the
process dies inside it, either all of the call's records are there or none.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_resume.core.filenames import is_usual_run
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint
from ray_resume.files import fsync_directory

if TYPE_CHECKING:
    from ray_resume.core.record_log import RecordLog
    from ray_resume.core.records import Record

__all__ = [
    "FORMAT_VERSION",
    "SUFFIX",
    "WriterFile",
    "read_writer",
    "read_writer_into",
    "remove_half_made",
    "write_whole",
    "writer_files",
]

FORMAT_VERSION = 3
"""Raised by one whenever an older ray_resume could misread what a newer one writes."""

SUFFIX = ".mdb"

_RECORDS = b"records"
_META = b"meta"
_HEADER_KEY = b"header"
_NASCENT = ".new"
# A sparse address range, not disk space: the file grows as it is written.
_INITIAL_MAP_BYTES = 16 << 20
_LOW_DISK_BYTES = 1 << 20
# A block of less is replaced by the next commit: 200 records, as a rule.
_SMALL_BLOCK_BYTES = 1 << 14
_KEY = struct.Struct(">Q").pack
# What LMDB makes it for the 126 readers that py-lmdb asks for.
_LOCK_FILE_BYTES = 8192

# py-lmdb refuses to open one file twice in a process, so whoever reads holds this lock for as long
# as the file is open; so does a writer that opens, moves or closes its map under such a reader.
_reading = threading.Lock()
_own: dict[str, WriterFile] = {}


class WriterFile:
    """The one file that this process writes. Not thread-safe; one owner, one thread at a time."""

    def __init__(self, path: Path, env: Any) -> None:
        self._path = path
        self._env = env
        self._meta, self._records = env.open_db(_META), env.open_db(_RECORDS)
        self._count = 0
        # The last block, if it is so small that the next commit may replace it.
        self._last: bytes | None = None

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self._path

    @classmethod
    def create(cls, directory: Path, run_id: str, header: Mapping[str, Any]) -> WriterFile:
        """Make ``<run_id>.mdb`` in ``directory``, with ``header`` (plain JSON data) in it.

        Raises:
            CheckpointError: the directory cannot be written to.
        """
        path = write_whole(directory, run_id, header, ())
        try:
            with _reading:
                writer = _own[os.path.realpath(path)] = cls(path, _open(path))
                return writer
        except (_lmdb().Error, OSError) as error:
            raise _unmade(path, error) from error

    def commit(self, records: Iterable[Record]) -> None:
        """Add ``records`` in one durable transaction; see the module's guarantees.

        Raises:
            CheckpointError: the disk is full or fails. Nothing of this call was committed.
        """
        from ray_resume.core.records import encode

        self.append(list(encode(records)))

    def append(self, blocks: Sequence[bytes]) -> None:
        """Do as :meth:`commit`, with blocks of records (see `records.encode`)."""
        # Imported here, because a process that only reads the file for another needs no pyarrow.
        from ray_resume.core.records import decode, encode_batches

        replaced = None
        if len(blocks) == 1 and self._last is not None:
            replaced = self._last
            blocks = list(encode_batches(map(decode, (replaced, *blocks))))
        first = self._count - (replaced is not None)
        try:
            items = _numbered(blocks, first)
            _put_all(self._env, self._records, items, replaced=replaced, named=True)
        except (_lmdb().Error, OSError) as error:
            raise CheckpointError(
                f"The checkpoint file {self._path} cannot be written: {_why(self._path, error)}. "
                "What was committed before is safe. Free space or mend the disk, and run again."
            ) from error
        self._count = first + len(blocks)
        if blocks:
            self._last = blocks[-1] if len(blocks[-1]) < _SMALL_BLOCK_BYTES else None

    def blocks(self) -> list[bytes]:
        """Return everything that was committed, as blocks of records (see `records.encode`)."""
        blocks: list[bytes] = []
        read_writer_into(self._path, lambda _: None, blocks.append, live=True)
        return blocks

    def close(self) -> None:
        """Close the file; it can be read afterwards."""
        with _reading:
            _own.pop(os.path.realpath(self._path), None)
            self._env.close()
        with contextlib.suppress(OSError):
            Path(f"{self._path}-lock").unlink(missing_ok=True)


def write_whole(
    directory: Path,
    run_id: str,
    header: Mapping[str, Any],
    blocks: Iterable[bytes],
) -> Path:
    """Make ``<run_id>.mdb`` with ``header`` and ``blocks`` of records; close it.

    Guarantees: the file has its name only when it is whole and durable; when this returns, the
    name is durable too.

    Raises:
        CheckpointError: the directory cannot be written to.
    """
    path = directory / f"{run_id}{SUFFIX}"
    nascent = directory / f".{run_id}{SUFFIX}{_NASCENT}"
    try:
        with _open(nascent) as env:
            text = json.dumps({**header, "run_id": run_id, "format": FORMAT_VERSION})
            _put_all(env, env.open_db(_META), [(_HEADER_KEY, text.encode())])
            _put_all(env, env.open_db(_RECORDS), _numbered(blocks, 0))
        Path(f"{nascent}-lock").unlink(missing_ok=True)
        failpoint("store.making")
        os.rename(nascent, path)
        failpoint("store.made")
        fsync_directory(directory)
    except (_lmdb().Error, OSError) as error:
        for half_made in (nascent, Path(f"{nascent}-lock")):
            with contextlib.suppress(OSError):
                half_made.unlink(missing_ok=True)
        raise _unmade(path, error) from error
    return path


def remove_half_made(directory: Path) -> None:
    """Remove what killed processes left of files that never got their name.

    Files of others stay: only a run's own have the id of a run in their name.
    Call it when no run is alive, under a lease that keeps others out.
    """
    for pattern in (f".*{SUFFIX}{_NASCENT}*", f"*{SUFFIX}-lock"):
        for path in directory.glob(pattern):
            if is_usual_run(path.name.lstrip(".").partition(".")[0]):
                path.unlink(missing_ok=True)


def writer_files(directory: Path) -> dict[str, Path]:
    """List the writers' files in ``directory``: ``{run id: path}``, ordered by run id."""
    return {
        path.name.removesuffix(SUFFIX): path
        for path in sorted(directory.glob(f"*{SUFFIX}"))
        if not path.name.startswith(".")
    }


def read_writer(path: Path, *, live: bool) -> tuple[dict[str, Any], RecordLog]:
    """Read a writer's file: its header, and its records.

    Args:
        live: whether its writer may be at work on this host, so that LMDB's lock is needed. What
            is read then is a snapshot, good to look at, not to skip by.

    Raises:
        CheckpointError: it is damaged, foreign, or of another format; the message names it.
    """
    from ray_resume.core.record_log import RecordLog

    headers: list[dict[str, Any]] = []
    log = RecordLog()
    read_writer_into(path, headers.append, log.append, live=live)
    return headers[0], log


def read_writer_into(
    path: Path,
    take_header: Callable[[dict[str, Any]], object],
    take: Callable[[bytes], object],
    *,
    live: bool,
) -> None:
    """Read a writer's file in parts, as one look at it: there may be millions of records.

    Args:
        take_header: is given the header, first.
        take: is given a block of records (see `records.encode`), time and again.
        live: as in :func:`read_writer`.

    Raises:
        CheckpointError: as :func:`read_writer`; some of it may have been given by then.
    """
    with _reading, _told(path):
        own = _own.get(os.path.realpath(path))
        if own is not None:
            # Its databases are open: to open them again waits for a commit, with the GIL held.
            _read(path, own._env, own._meta, own._records, take_header, take)
            return
        while True:
            try:
                with _open(path, readonly=True, lock=live) as env:
                    _check_whole(path, env)
                    meta = env.open_db(_META, create=False)
                    records = env.open_db(_RECORDS, create=False)
                    _read(path, env, meta, records, take_header, take)
                    return
            except _lmdb().MapResizedError:
                continue  # Its writer has made it grow since it was opened.


def _open(path: Path, *, readonly: bool = False, lock: bool = True) -> Any:
    if lock:
        _reserve(Path(f"{path}-lock"))
    # No flag here weakens durability: LMDB syncs data and meta page in every commit by default.
    return _lmdb().open(
        str(path),
        subdir=False,
        create=not readonly,
        readonly=readonly,
        lock=lock,
        max_dbs=2,
        map_size=0 if readonly else _INITIAL_MAP_BYTES,
    )


def _reserve(lock_file: Path) -> None:
    """Have the disk keep room for LMDB's lock file.

    LMDB makes it with a hole in it and maps that: on a full disk, touching it is a SIGBUS.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return  # Somebody who only looks; LMDB knows how to do without.
        raise
    try:
        os.posix_fallocate(descriptor, 0, _LOCK_FILE_BYTES)
    finally:
        os.close(descriptor)


def _numbered(blocks: Iterable[bytes], first: int) -> list[tuple[bytes, bytes]]:
    return [(_KEY(number), block) for number, block in enumerate(blocks, first)]


def _put_all(
    env: Any,
    database: Any,
    items: Sequence[tuple[bytes, bytes]],
    *,
    replaced: bytes | None = None,
    named: bool = False,
) -> None:
    """Put ``items`` in one durable transaction; the map grows as it must.

    Args:
        items: their keys are higher than those that are there, and ascending.
        replaced: the value that the first of them takes the place of, which is the last.
        named: whether the file has its name already, so that it counts what is put there.
    """
    while True:
        try:
            with env.begin(db=database, write=True) as transaction:
                cursor = transaction.cursor()
                if replaced is not None:
                    if not cursor.last() or cursor.item() != (items[0][0], replaced):
                        raise OSError("it has records that this process did not write")
                    cursor.delete()
                _, added = cursor.putmulti(items, append=True)
                if added != len(items):
                    raise OSError("it has records that this process did not write")
                if named:
                    failpoint("store.in_commit")
            return
        except _lmdb().MapFullError:
            failpoint("store.before_growth")
            with _reading:
                env.set_mapsize(env.info()["map_size"] * 2)
            failpoint("store.after_growth")


def _unmade(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint file {path} cannot be made: {_why(path, error)}. "
        "See that the directory exists, is writable and has space, and run again."
    )


def _why(path: Path, error: Exception) -> str:
    """Spell ``error``. LMDB calls it an input/output error if half of a write found room."""
    with contextlib.suppress(OSError):
        disk = os.statvfs(path.parent)
        free = disk.f_bavail * disk.f_frsize
        if free < _LOW_DISK_BYTES:
            return f"{error} (the disk is full: {free} bytes are free)"
    return str(error)


def _lmdb() -> Any:
    # Workers import users' modules, and those import ray_resume. Only a process that opens a store
    # may load lmdb, since LMDB forbids to carry an open file over a fork.
    import lmdb

    return lmdb


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (_lmdb().Error, OSError) as error:
        raise CheckpointError(
            f"The checkpoint file {path} cannot be read: {error}. If it is damaged, restore it "
            "from a copy, or start over with an empty checkpoint and an empty output folder."
        ) from error


def _read(
    path: Path,
    env: Any,
    meta: Any,
    records: Any,
    take_header: Callable[[dict[str, Any]], object],
    take: Callable[[bytes], object],
) -> None:
    with env.begin() as transaction:
        take_header(_header(path, transaction.get(_HEADER_KEY, db=meta)))
        for block in transaction.cursor(db=records).iternext(keys=False, values=True):
            take(block)


def _check_whole(path: Path, env: Any) -> None:
    # LMDB does not check it, and touching a page of its map that is not in the file is a SIGBUS.
    needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    size = path.stat().st_size  # Looked at last: a live writer's file grows, and pages come first.
    if size < needed:
        raise OSError(f"it is cut short, {size} bytes of at least {needed}")


def _header(path: Path, text: bytes | None) -> dict[str, Any]:
    try:
        header = json.loads(text or b"")
        version = header["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is an LMDB file, but not one of ray_resume's. Move it elsewhere."
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}, and this ray_resume reads format {FORMAT_VERSION}. "
            + (
                "It is of a version before the first release: go on with that one, or start over "
                "with an empty checkpoint and an empty output folder."
                if type(version) is int and version < FORMAT_VERSION
                else "Upgrade ray_resume (pip install -U ray-resume), and run again."
            )
        )
    return dict(header)
