"""Lists the files of a read as sources, without opening any of them.

The rules are those of Ray Data's own listing: directories are listed recursively, names that
start with "." or "_" are skipped, extensions and filters apply. Two things are added that
Ray's does not give: the modification time, and an identity that is the same however a path is
written. (Symbolic links are not resolved: another link is another source.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType

from ray_resume.core.records import Fingerprint
from ray_resume.core.sources import Source, SourceTable, refuse_repeated
from ray_resume.errors import ResumeError
from ray_resume.raydata.paths import is_http
from ray_resume.read.paths import id_of_url

__all__ = [
    "has_changed",
    "is_hidden",
    "list_files",
    "relative_to",
]

_HIDDEN = (".", "_")


def list_files(
    filesystem: FileSystem,
    paths: Iterable[str],
    *,
    extensions: Sequence[str] | None,
    keep: Callable[[list[str]], list[str]] | None,
    ignore_missing: bool,
) -> SourceTable:
    """List the files at and under ``paths``, in the order given, directories sorted.

    Args:
        extensions: only files that end so, without regard to case; None for all.
        keep: takes the paths found and returns those to read, as a partition filter does.
        ignore_missing: whether a path that is not there is skipped.

    Raises:
        FileNotFoundError: a path is not there, or nothing is found.
        ResumeError: a file is named twice.
    """
    given = list(paths)
    infos: list[FileInfo] = []
    for path, info in zip(given, filesystem.get_file_info(given), strict=True):
        if info.type == FileType.Directory:
            infos.extend(_list_directory(filesystem, path))
        elif info.type == FileType.File:
            infos.append(info)
        elif not ignore_missing:
            raise FileNotFoundError(f"There is no file or directory {path!r} to read.")
    if extensions is not None:
        infos = [info for info in infos if _has_extension(info.path, extensions)]
    names = [info.path for info in infos]
    if keep is not None:
        kept = set(keep(names))
        infos = [info for info, name in zip(infos, names, strict=True) if name in kept]
        names = [name for name in names if name in kept]
    if not infos:
        among = f" that ends in {' or '.join(extensions)}" if extensions else ""
        raise FileNotFoundError(f"There is no file{among} to read under {', '.join(given)}.")
    for name in names:
        if "\t" in name or "\r" in name or "\n" in name:
            raise ResumeError(
                f"The name of {name!r} has a tab or a line break in it, which Ray Data's path code "
                "drops, so it cannot be opened. Rename it."
            )
    if is_http(filesystem):
        sources = SourceTable.of(
            Source(id_of_url(info.path), info.path, _fingerprint(info)) for info in infos
        )
    else:
        sizes, mtimes_ns = (info.size for info in infos), (info.mtime_ns for info in infos)
        sources = SourceTable.of_files(names, sizes, mtimes_ns)
    refuse_repeated(sources)
    return sources


def has_changed(filesystem: FileSystem, path: str, fingerprint: Fingerprint) -> bool:
    """Say whether a file is gone or has another size or modification time than when listed."""
    info = filesystem.get_file_info(path)
    return info.type == FileType.NotFound or _fingerprint(info) != fingerprint


def _fingerprint(info: FileInfo) -> Fingerprint:
    return Fingerprint(info.size, info.mtime_ns)


def relative_to(sources: SourceTable, root: str) -> SourceTable:
    """Make the ids of files relative to ``root``, so that the data may move.

    Raises:
        ResumeError: a file is not under it.
    """
    base = root.rstrip("/") + "/"
    outside = next((name for name in sources.ids() if not name.startswith(base)), None)
    if outside is not None:
        raise ResumeError(
            f"{outside} is not under source_root={root!r}, so it has no path relative to it."
        )
    return sources.relative_to(base)


def _list_directory(filesystem: FileSystem, directory: str) -> list[FileInfo]:
    base = directory.rstrip("/") + "/"
    try:
        return sorted(
            (
                info
                for info in filesystem.get_file_info(FileSelector(directory, recursive=True))
                if info.is_file and not is_hidden(info.path, base)
            ),
            key=lambda info: info.path,
        )
    except UnicodeDecodeError as error:
        raise ResumeError(
            f"The name of {error.object!r} is not UTF-8, so pyarrow cannot open it. Rename it."
        ) from None


def is_hidden(path: str, root: str) -> bool:
    """Say whether a listing of ``root`` skips ``path``, which is in it, by its first folder."""
    base = f"{root.rstrip('/')}/"
    return path.startswith(base) and path.removeprefix(base).startswith(_HIDDEN)


def _has_extension(path: str, extensions: Sequence[str] | None) -> bool:
    if extensions is None:
        return True
    name = path.lower()
    endings = tuple(f".{extension.lower().lstrip('.')}" for extension in extensions)
    # A query may say which version of an object it is; in the name of a file, "?" is a character.
    return name.endswith(endings) or name.split("?", 1)[0].endswith(endings)
