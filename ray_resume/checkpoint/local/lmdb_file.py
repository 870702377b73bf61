"""The store: one LMDB file per writer. Only this module imports lmdb.

A writer's file is called ``<run id>.mdb`` and appears under that name only as a valid store.
Records are added and superseded, never deleted. They stand in blocks (`records.encode`), whose
keys are their numbers in the file. So blocks fill its pages from left to right: with random keys,
each commit would write most of the pages of a large file again. As long as the last block is small,
a commit replaces it by one that holds its records and the new ones. So a run that commits one
record at a time writes few blocks.

Guarantees of :meth:`WriterFile.commit`: when it returns, the records survive the death of the
process and of the machine (LMDB with ``sync`` and ``metasync``, its defaults). If it raises or the
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
from typing import TYPE_CHECKING, Any, TypeAlias

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
    "WriterContents",
    "WriterFile",
    "read_writer",
    "read_writer_into",
    "remove_half_made",
    "write_whole",
    "writer_files",
]

FORMAT_VERSION = 4
"""Raised by one whenever an older ray_resume could misread what a newer one writes."""

SUFFIX = ".mdb"

_RECORDS = b"records"
_META = b"meta"
_HEADER_KEY = b"header"
_NASCENT = ".new"
# A sparse address range, not disk space: the file grows as it is written.
_INITIAL_MAP_BYTES = 16 << 20
_LOW_DISK_BYTES = 1 << 20
# The next commit replaces a block of fewer bytes. They hold some 200 records.
_SMALL_BLOCK_BYTES = 1 << 14
_KEY = struct.Struct(">Q").pack
# The size that LMDB gives the lock file, for the 126 readers that py-lmdb asks for.
_LOCK_FILE_BYTES = 8192

# py-lmdb refuses to open one file twice in a process, so a reader holds this lock for as long as
# the file is open. A writer holds it when it opens, moves or closes its map, for it may be read.
_reading = threading.Lock()
_own: dict[str, WriterFile] = {}


WriterContents: TypeAlias = tuple[Mapping[str, Any], Sequence[bytes]]
"""A header, and blocks of records (see `records.encode`)."""


class WriterFile:
    """The one file that this process writes. It has one owner, and one thread uses it at a time."""

    def __init__(self, path: Path, env: Any) -> None:
        self._path = path
        self._env = env
        self._meta, self._records = env.open_db(_META), env.open_db(_RECORDS)
        self._count = 0
        # The last block, if it is so small that the next commit may replace it.
        self._last: bytes | None = None

    @property
    def path(self) -> Path:
        """The path of the file."""
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
        """Commit blocks of records (see `records.encode`), as :meth:`commit` does."""
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
                "All earlier commits are safe. Free space or repair the disk, and run again."
            ) from error
        self._count = first + len(blocks)
        if blocks:
            self._last = blocks[-1] if len(blocks[-1]) < _SMALL_BLOCK_BYTES else None

    def blocks(self) -> list[bytes]:
        """Return all committed records, as blocks (see `records.encode`)."""
        blocks: list[bytes] = []
        read_writer_into(self._path, lambda _: None, blocks.append, live=True)
        return blocks

    def contents(self) -> WriterContents:
        """Return the header and all committed records, as they are in the file."""
        headers: list[dict[str, Any]] = []
        blocks: list[bytes] = []
        read_writer_into(self._path, headers.append, blocks.append, live=True)
        return headers[0], blocks

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
    """Remove the files of killed processes that never got their final name.

    Only names with the id of a run in them are removed: other files belong to the user. Call it
    when no run is alive, under a lease that keeps others out.
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
        live: whether its writer may be at work on this host, so that LMDB's lock is needed. The
            records are a snapshot then: good for reports, and not to skip sources by.

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
    """Read a writer's file block by block, in one transaction: there may be millions of records.

    Args:
        take_header: called first, with the header.
        take: called with each block of records (see `records.encode`).
        live: as in :func:`read_writer`.

    Raises:
        CheckpointError: as :func:`read_writer`; some blocks may have been read by then.
    """
    with _reading, _reading_errors(path):
        own = _own.get(os.path.realpath(path))
        if own is not None:
            # Its databases are open. To open them again waits for a commit, with the GIL held.
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
                continue  # Its writer has made the file grow since this process opened it.


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
    """Reserve disk space for LMDB's lock file.

    LMDB makes a sparse file and maps it: on a full disk, a write to the map raises SIGBUS.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return  # This process may only read. LMDB does without the lock file then.
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
    """Put ``items`` in one durable transaction; the map grows as needed.

    Args:
        items: their keys are ascending, and higher than all keys in the file.
        replaced: the last value in the file, which the first item replaces.
        named: whether the file has its name already, so that a commit to it counts.
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
        "Make sure that the directory exists, is writable and has space, and run again."
    )


def _why(path: Path, error: Exception) -> str:
    """Format ``error``. If the disk fills up during a write, LMDB reports an input/output error."""
    with contextlib.suppress(OSError):
        disk = os.statvfs(path.parent)
        free = disk.f_bavail * disk.f_frsize
        if free < _LOW_DISK_BYTES:
            return f"{error} (the disk is full: {free} bytes are free)"
    return str(error)


def _lmdb() -> Any:
    # Workers import users' modules, which import ray_resume. Only a process that opens a store may
    # load lmdb, since LMDB forbids to carry an open file over a fork.
    import lmdb

    return lmdb


@contextlib.contextmanager
def _reading_errors(path: Path) -> Iterator[None]:
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
    # LMDB does not check it, and to read a page of its map that is not in the file raises SIGBUS.
    needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    # Read after `needed`: a live writer's file grows, and it writes pages before it counts them.
    size = path.stat().st_size
    if size < needed:
        raise OSError(f"it is cut short, {size} bytes of at least {needed}")


def _header(path: Path, text: bytes | None) -> dict[str, Any]:
    try:
        header = json.loads(text or b"")
        version = header["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is an LMDB file, but ray_resume did not make it. Move it elsewhere."
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}, and this ray_resume reads format {FORMAT_VERSION}. "
            + (
                "A version before the first release made it: go on with that version, or start "
                "over with an empty checkpoint and an empty output folder."
                if type(version) is int and version < FORMAT_VERSION
                else "Upgrade ray_resume (pip install -U ray-resume), and run again."
            )
        )
    return dict(header)
