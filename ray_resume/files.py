"""Files on any storage: one atomic, durable write, and URIs without secrets.

Loads no pyarrow: the functions that take a pyarrow filesystem are given one. `filesystems` opens
paths and URIs. Knows nothing of checkpoints and outputs.

Invariant: a file has its name only when it is whole.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable
from typing import IO, Any

__all__ = [
    "atomic_put",
    "canonical_uri",
    "fsync_directory",
    "is_atomic",
    "one_line",
    "public_uri",
    "whole_uri",
    "write_atomically",
]

# On these storages an object appears when its upload is closed. Elsewhere a rename gives a name.
_ATOMIC = frozenset({"s3", "gcs", "abfs"})

_SCHEMES = {"gcs": "gs"}
# In these URIs, an access key stands before the "@"; in others, a user or a container does.
_KEYS_FOR_USERS = frozenset({"s3", "s3a", "gs", "gcs"})
_SECRET_OPTION = re.compile(
    r"([?&][^=&]*(?:secret|token|key|password|sas|sig)[^=&]*=)[^&]*", re.IGNORECASE
)

_MAX_LINE = 400


def write_atomically(
    path: str | os.PathLike[str],
    content: bytes | Callable[[IO[bytes]], object],
    *,
    hidden: str | None = None,
    before_rename: Callable[[], None] = lambda: None,
) -> None:
    """Write a file of this host, or replace it, under a hidden name that is renamed at the end.

    Args:
        content: the bytes, or a function that writes them into the open file.
        hidden: the name meanwhile, ``.<name>`` by default. Give one that nobody else uses where
            several processes may write ``path`` at once.
        before_rename: called when the content is written.

    Raises:
        OSError: the write failed, and nothing is left behind.

    Guarantees: the file has its name only when its content is durable. The name is durable after
    :func:`fsync_directory`. A killed process leaves at most the hidden file behind.
    """
    folder, name = os.path.split(os.fspath(path))
    nascent = os.path.join(folder, hidden or f".{name}")
    try:
        with open(nascent, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            before_rename()
            os.fsync(file.fileno())
        os.replace(nascent, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(nascent)
        raise


def fsync_directory(directory: str | os.PathLike[str]) -> None:
    """Make names that were created or renamed in ``directory`` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_put(filesystem: Any, path: str, data: Any) -> None:
    """Write a file of any pyarrow filesystem that appears whole or not at all, and is durable.

    Raises:
        OSError: the write failed. A hidden file may be left behind.
    """
    if is_atomic(filesystem):
        # No compression by the name: the content may be compressed already.
        # One write: an error in a later one would still close the stream, and half would appear.
        with filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(data)
        return
    folder, _, name = path.rpartition("/")
    hidden = f".{name}.{secrets.token_hex(4)}"
    if filesystem.type_name == "local":
        os.makedirs(folder, exist_ok=True)
        write_atomically(path, data, hidden=hidden)
        fsync_directory(folder)
        return
    filesystem.create_dir(folder, recursive=True)
    with filesystem.open_output_stream(f"{folder}/{hidden}", compression=None) as stream:
        stream.write(data)
    filesystem.move(f"{folder}/{hidden}", path)


def is_atomic(filesystem: Any) -> bool:
    """Say whether a file appears on this filesystem only when its stream is closed."""
    return filesystem.type_name in _ATOMIC


def public_uri(uri: str) -> str:
    """Return ``uri`` without passwords and keys, for messages and logs."""
    return _SECRET_OPTION.sub(r"\1***", _without_secrets(whole_uri(uri)))


def whole_uri(uri: str) -> str:
    """Return ``uri`` with the second slash that pathlib takes out of it."""
    return re.sub("^([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", r"\1://", uri)


def canonical_uri(filesystem: Any, path: str, uri: str) -> str:
    """Return one URI for all ways of writing it: without credentials and options.

    Args:
        path: the path on ``filesystem``.
        uri: what the user gave; not a URI if the user gave the filesystem.
    """
    if "://" not in uri:
        kind = filesystem.type_name
        return f"{_SCHEMES.get(kind, kind)}://{path}"
    return _without_secrets(uri).partition("?")[0].rstrip("/")


def _without_secrets(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    authority, slash, path = rest.partition("/")
    if scheme.lower() in _KEYS_FOR_USERS and ":" in authority and "@" not in authority:
        # A secret with a "/" in it, which should have been written as "%2F".
        authority, slash, path = rest.rpartition("@")[2].partition("/")
    user, at, host = authority.rpartition("@")
    if scheme.lower() in _KEYS_FOR_USERS:
        user = at = ""
    return f"{scheme}{separator}{user.partition(':')[0]}{at}{host}{slash}{path}"


def one_line(error: Exception) -> str:
    """Return the first line of an error, cut short: some of pyarrow's fill a screen."""
    line = (str(error).strip().splitlines() or [repr(error)])[0]
    return line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]} ..."
