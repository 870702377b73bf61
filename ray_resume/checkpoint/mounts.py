"""The kind of file system that a path is on, by the kernel's table of mounts.

LMDB maps its file into memory, and the host's kernel locks it. On a file system that other hosts
can change, the map goes stale, and neither these locks nor `flock` exclude other hosts. So LMDB
files never stand on one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["filesystem_type_of", "is_remote", "network_filesystem_type"]

_MOUNTS = "/proc/self/mountinfo"

_REMOTE = frozenset(
    {"9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "gfs", "gfs2", "glusterfs"}
    | {"gpfs", "kafs", "lustre", "mfs", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs"}
    | {"pvfs2", "quobyte", "smb", "smb2", "smb3", "smbfs", "vboxsf", "vmhgfs", "wekafs"}
)

# A file system in user space may be anything, most often a remote disk. These are local.
_LOCAL_FUSE = frozenset(
    {"bindfs", "encfs", "fuse-overlayfs", "gocryptfs", "lxcfs", "mergerfs", "ntfs", "ntfs-3g"}
    | {"unionfs", "unionfs-fuse"}
)


def network_filesystem_type(path: Path) -> str | None:
    """Return the kind of file system ``path`` is or would be on, if other hosts may share it.

    None where it is local, or unknown (only Linux has the table).
    """
    try:
        mounts = Path(_MOUNTS).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    # A link may lead elsewhere, also from a directory above. A missing path is no link.
    fstype = filesystem_type_of(mounts, os.path.realpath(path))
    return fstype if fstype is not None and is_remote(fstype) else None


def filesystem_type_of(mounts: str, path: str) -> str | None:
    """Find the mount that ``path`` is under in the text of a mountinfo file (see proc(5)).

    Args:
        path: absolute, without links.

    Returns:
        The kind of file system, such as ``ext4`` or ``fuse.sshfs``; None if nothing is mounted
        there.
    """
    found, longest = None, -1
    for line in mounts.splitlines():
        about, separator, kind = line.partition(" - ")
        fields, kinds = about.split(" "), kind.split(" ")
        if not separator or len(fields) < 5 or not kinds[0]:
            continue
        point = _unescaped(fields[4]).rstrip("/")
        # If two mounts are on one directory, the later one is on top.

        if f"{path}/".startswith(f"{point}/") and len(point) >= longest:
            found, longest = kinds[0], len(point)
    return found


def is_remote(fstype: str) -> bool:
    """Say whether other hosts may change files on a file system of this kind."""
    kind, _, subtype = fstype.partition(".")
    if kind == "fuse":
        return subtype not in _LOCAL_FUSE
    return kind in _REMOTE


def _unescaped(field: str) -> str:
    """Undo the octal escapes of a blank, a tab, a line break and a backslash."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
