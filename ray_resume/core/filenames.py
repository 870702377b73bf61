"""How output files are named: a name says which checkpoint and which run wrote the file.

``<checkpoint>-<run>-<source's digest>-<random>[-<tag>][~<label>].<format>[.<compression>]``; zeros
for the digest where several sources share the file. In a file that a merge made, ``ffff`` and a
size stand there (see `OutputName.filled_bytes`). The random part is drawn for each write. A label
is for people, who give it.

In a subfolder (a partition) a name has a tag, which stands for that folder. So a copy that a user
made in another folder is recognized, and is never removed as a leftover. In the output folder
itself names have no tag. Before there were tags, names in subfolders had none either: then only a
record can tell that such a file is no copy.
"""

from __future__ import annotations

import functools
import hashlib
import re
import secrets
from dataclasses import dataclass
from urllib.parse import quote

__all__ = [
    "MERGED_DIGEST",
    "NAME_DIGEST_BYTES",
    "SHARED_DIGEST",
    "OutputName",
    "is_usual_run",
    "stem_of",
]

NAME_DIGEST_BYTES = 8
"""How much of a source's digest is in a file name: to tell files apart by eye, not to identify."""

SHARED_DIGEST = "0" * 2 * NAME_DIGEST_BYTES
"""The digest in the name of a file that may hold rows of several sources."""

MERGED_DIGEST = "ffff"
"""The digest in the name of a merged file begins with it; that of a source's own file does not."""

_MAX_FILLED_BYTES = (1 << 48) - 1

_MAX_LABEL = 120

_NAME = re.compile(
    r"\.?([0-9a-f]{8})-([0-9a-f]{12})-([0-9a-f]{16})-([0-9a-f]{16})(?:-([0-9a-f]{8}))?"
    r"(?:~[A-Za-z0-9_%-]+)?\.[a-z]+(?:\.[a-z0-9]+)?"
)


@dataclass(frozen=True)
class OutputName:
    """The name of an output file: its checkpoint, its run, its source.

    ``in_place`` says whether the name proves that the file was written where it is.
    """

    checkpoint: str
    run_id: str
    digest: str
    random: str
    in_place: bool = True

    @property
    def is_shared(self) -> bool:
        """Whether it may hold rows of several sources."""
        return self.digest == SHARED_DIGEST or self.filled_bytes is not None

    @property
    def filled_bytes(self) -> int | None:
        """The size for which merged files were enough for this one; 0 if they were not enough.

        None if no merge made the file. It may be smaller than the files were together.
        """
        return int(self.digest[4:], 16) if self.digest.startswith(MERGED_DIGEST) else None

    @classmethod
    def parse(cls, name: str) -> OutputName | None:
        """Read a name in the folder, hidden or not; None if it is not one of ours."""
        folder, _, bare = name.rpartition("/")
        match = _NAME.fullmatch(bare)
        # A copy that a user made in another folder, or under another ending, is the user's.
        if match is None or not all("=" in part for part in folder.split("/") if folder):
            return None
        checkpoint, run_id, digest, random, tag = match.groups()
        if tag is not None and (not folder or tag != _tag_of(folder)):
            return None
        return cls(checkpoint, run_id, digest, random, not folder or tag is not None)


def is_usual_run(run_id: str) -> bool:
    """Return whether a run id has the format of those that runs draw."""
    return len(run_id) == 12 and set(run_id) <= set("0123456789abcdef")


def stem_of(
    prefix: str,
    digest: bytes | None,
    folder: str = "",
    *,
    filled_bytes: int | None = None,
    label: str = "",
) -> str:
    """Make a new name, without its ending; no other file has or had it.

    Args:
        prefix: ``<checkpoint>-<run>``.
        digest: ``NAME_DIGEST_BYTES`` bytes of the source's digest; None if several share the file.
        folder: the subfolder of the output folder that the file is for, ``""`` for none.
        filled_bytes: of a merged file; see `OutputName.filled_bytes`.
        label: what people know the file by: it is in the name, as in a URL, and cut off if long.
    """
    tag = f"-{_tag_of(folder.rstrip('/'))}" if folder else ""
    if filled_bytes is not None:
        digits = f"{MERGED_DIGEST}{min(filled_bytes, _MAX_FILLED_BYTES):012x}"
    else:
        digits = SHARED_DIGEST if digest is None else digest.hex()
        if digits.startswith(MERGED_DIGEST):
            # It is read by people only.
            digits = f"fffe{digits[4:]}"
    return f"{prefix}-{digits}-{secrets.token_hex(8)}{tag}{_labelled(label)}"


def _labelled(label: str) -> str:
    text = quote(label, safe="", errors="surrogatepass").replace(".", "%2E").replace("~", "%7E")
    return f"~{text[:_MAX_LABEL]}" if text else ""


@functools.lru_cache(1024)
def _tag_of(folder: str) -> str:
    """Return what stands for a subfolder in the names of the files that are written into it."""
    return hashlib.blake2b(folder.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
