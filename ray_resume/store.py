"""The store: one LMDB file per writer, and the union of all of them. The only import of lmdb.

A writer's file is called ``<run id>.mdb`` and appears under that name only as a valid store.
Records are added and superseded, never deleted. The key of a record is its source's 16-byte
digest; the value is spelt by :mod:`ray_resume.record`.

Guarantees of :meth:`WriterFile.commit`: when it returns, the records survive the death of the
process and of the machine (LMDB with ``sync`` and ``metasync``, its defaults); if it raises or the
process dies inside it, either all of the call's records are there or none.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_resume.errors import CheckpointError
from ray_resume.faults import reached
from ray_resume.record import Record, decode, digest, encode, is_completed, precedence

__all__ = [
    "FORMAT_VERSION",
    "SUFFIX",
    "Union",
    "WriterFile",
    "fsync_directory",
    "read_writer",
    "remove_half_made",
    "write_whole",
    "writer_files",
]

FORMAT_VERSION = 1
"""Raised by one whenever an older ray_resume could misread what a newer one writes."""

SUFFIX = ".mdb"

_RECORDS = b"records"
_META = b"meta"
_HEADER_KEY = b"header"
_NASCENT = ".new"
# A sparse address range, not disk space: the file grows as it is written.
_INITIAL_MAP_BYTES = 16 << 20
_LITTLE_SPACE_BYTES = 1 << 20
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

    def commit(self, records: Sequence[Record]) -> None:
        """Add ``records`` in one durable transaction; see the module's guarantees.

        Raises:
            CheckpointError: the disk is full or fails. Nothing of this call was committed.
        """
        items = [(digest(record.source_id), encode(record)) for record in records]
        try:
            _put_all(self._env, self._records, items, named=True)
        except (_lmdb().Error, OSError) as error:
            raise CheckpointError(
                f"The checkpoint file {self._path} cannot be written: {_why(self._path, error)}. "
                "What was committed before is safe. Free space or mend the disk, and run again."
            ) from error

    def pairs(self) -> Iterator[tuple[bytes, bytes]]:
        """Return everything that was committed, as ``(digest, encoded record)`` pairs."""
        return read_writer(self._path, live=True)[1]

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
    pairs: Iterable[tuple[bytes, bytes]],
) -> Path:
    """Make ``<run_id>.mdb`` with ``header`` and ``pairs`` (digest, encoded record); close it.

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
            # In the order of their keys they fill pages from left to right.
            _put_all(env, env.open_db(_RECORDS), sorted(pairs))
        Path(f"{nascent}-lock").unlink(missing_ok=True)
        reached("store.making")
        os.rename(nascent, path)
        reached("store.made")
        fsync_directory(directory)
    except (_lmdb().Error, OSError) as error:
        for half_made in (nascent, Path(f"{nascent}-lock")):
            with contextlib.suppress(OSError):
                half_made.unlink(missing_ok=True)
        raise _unmade(path, error) from error
    return path


def remove_half_made(directory: Path) -> None:
    """Remove what killed processes left of files that never got their name.

    Call it when no run is alive, under a lease that keeps others out.
    """
    for pattern in (f".*{SUFFIX}{_NASCENT}*", f"*{SUFFIX}-lock"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


def writer_files(directory: Path) -> dict[str, Path]:
    """List the writers' files in ``directory``: ``{run id: path}``, ordered by run id."""
    return {
        path.name.removesuffix(SUFFIX): path
        for path in sorted(directory.glob(f"*{SUFFIX}"))
        if not path.name.startswith(".")
    }


def read_writer(path: Path, *, live: bool) -> tuple[dict[str, Any], Iterator[tuple[bytes, bytes]]]:
    """Read a writer's file: its header, and its ``(digest, encoded record)`` pairs.

    Args:
        live: whether its writer may be at work on this host, so that LMDB's lock is needed. What
            is read then is a snapshot, good to look at, not to skip by.

    Raises:
        CheckpointError: it is damaged, foreign, or of a newer format; the message names it.
    """
    with _reading, _told(path):
        own = _own.get(os.path.realpath(path))
        if own is not None:
            # Its databases are open: to open them again waits for a commit, with the GIL held.
            return _read(path, own._env, own._meta, own._records)
        while True:
            try:
                with _open(path, readonly=True, lock=live) as env:
                    _check_whole(path, env)
                    meta = env.open_db(_META, create=False)
                    return _read(path, env, meta, env.open_db(_RECORDS, create=False))
            except _lmdb().MapResizedError:
                continue  # Its writer has made it grow since it was opened.


class Union:
    """The newest record of each source over several writers' files.

    Of two records the one with the higher sequence number counts; on a tie, the one of the lower
    run id, whichever files the two are in: the union of any files, merged or not, is the same.
    Records are kept as bytes and parsed when they are asked for.
    """

    def __init__(
        self,
        writers: Mapping[str, Iterable[tuple[bytes, bytes]]],
        *,
        owner: Callable[[bytes], str] = lambda _: "a checkpoint file",
    ) -> None:
        """Make the union of ``{run id: pairs}``; ``owner`` says in which file a value is."""
        self._values: dict[bytes, bytes] = {}
        self._owner = owner
        for run_id in sorted(writers):
            for key, value in writers[run_id]:
                known = self._values.get(key)
                if known is None or self._counts(value, known):
                    self._values[key] = value

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Record]:
        return map(self._decode, self._values.values())

    def pairs(self) -> Iterable[tuple[bytes, bytes]]:
        """Return the ``(digest, encoded record)`` pairs that count."""
        return self._values.items()

    def get(self, source_id: str) -> Record | None:
        """Return the record that counts for ``source_id``, if there is one."""
        value = self._values.get(digest(source_id))
        return None if value is None else self._decode(value)

    def completed_outside(self, digests: Collection[bytes]) -> tuple[int, Record | None]:
        """Count the completed sources that are not among ``digests``; return one of them, too."""
        values = [
            value
            for key, value in self._values.items()
            if key not in digests and is_completed(value)
        ]
        return len(values), self._decode(values[0]) if values else None

    def highest_sequence(self) -> int:
        """Return the highest sequence number in use, 0 if there is none."""
        return max(map(self._precedence, self._values.values()), default=0)

    def _counts(self, value: bytes, known: bytes) -> bool:
        """Say whether the encoded record ``value`` takes the place of ``known``."""
        ours, theirs = self._precedence(value), self._precedence(known)
        if ours != theirs or value == known:
            return ours > theirs
        return self._decode(value).run_id < self._decode(known).run_id

    def _decode(self, value: bytes) -> Record:
        try:
            return decode(value)
        except CheckpointError as error:
            raise self._damaged(value, error) from error

    def _precedence(self, value: bytes) -> int:
        try:
            return precedence(value)
        except CheckpointError as error:
            raise self._damaged(value, error) from error

    def _damaged(self, value: bytes, error: CheckpointError) -> CheckpointError:
        return CheckpointError(
            f"In {self._owner(value)} {error}. It is damaged: restore it from a copy, or start "
            "over with an empty checkpoint and an empty output folder."
        )


def fsync_directory(directory: Path) -> None:
    """Make names that were created or renamed in ``directory`` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _put_all(
    env: Any, database: Any, items: Sequence[tuple[bytes, bytes]], *, named: bool = False
) -> None:
    """Put ``items`` in one durable transaction; the map grows as it must.

    Args:
        named: whether the file has its name already, so that it counts what is put there.
    """
    while True:
        try:
            with env.begin(db=database, write=True) as transaction:
                for key, value in items:
                    transaction.put(key, value)
                if named:
                    reached("store.in_commit")
            return
        except _lmdb().MapFullError:
            reached("store.before_growth")
            with _reading:
                env.set_mapsize(env.info()["map_size"] * 2)
            reached("store.after_growth")


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
        if free < _LITTLE_SPACE_BYTES:
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
    except (_lmdb().Error, OSError) as error:
        raise CheckpointError(
            f"The checkpoint file {path} cannot be read: {error}. If it is damaged, restore it "
            "from a copy, or start over with an empty checkpoint and an empty output folder."
        ) from error


def _read(
    path: Path, env: Any, meta: Any, records: Any
) -> tuple[dict[str, Any], Iterator[tuple[bytes, bytes]]]:
    with env.begin() as transaction:
        header = _header(path, transaction.get(_HEADER_KEY, db=meta))
        cursor = transaction.cursor(db=records)
        return header, iter([(bytes(key), bytes(value)) for key, value in cursor])


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
            "Upgrade ray_resume (pip install -U ray-resume), and run again."
        )
    return dict(header)
