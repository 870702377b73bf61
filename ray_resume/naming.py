"""How output files are called, so that anybody who sees a name can tell whose it is.

``<checkpoint>-<run>-<source's digest>-<random>.<format>``; zeros for the digest where several
sources share the file. The random part is drawn for each write.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

__all__ = ["DIGEST_BYTES", "OutputName", "stem_of"]

DIGEST_BYTES = 8
"""How much of a source's digest is in a file name: to tell files apart by eye, not to identify."""

_SHARED = bytes(DIGEST_BYTES)

_NAME = re.compile(r"\.?([0-9a-f]{8})-([0-9a-f]{12})-([0-9a-f]{16})-([0-9a-f]{16})\.[a-z]+")


@dataclass(frozen=True)
class OutputName:
    """The name of an output file, and whose it is."""

    checkpoint: str
    run_id: str
    digest: str
    random: str

    @property
    def is_shared(self) -> bool:
        """Whether it may hold rows of several sources."""
        return self.digest == _SHARED.hex()

    @classmethod
    def parse(cls, name: str) -> OutputName | None:
        """Read a name in the folder, hidden or not; None if it is not one of ours."""
        *folders, bare = name.split("/")
        match = _NAME.fullmatch(bare)
        # A copy that somebody made in a folder of his own, or under another ending, is his.
        if match is None or not all("=" in folder for folder in folders):
            return None
        return cls(*match.groups())


def stem_of(prefix: str, digest: bytes | None) -> str:
    """Make a name, but for its ending, that nobody has had before.

    Args:
        prefix: ``<checkpoint>-<run>``.
        digest: ``DIGEST_BYTES`` bytes of the source's digest; None if several share the file.
    """
    return f"{prefix}-{(_SHARED if digest is None else digest).hex()}-{secrets.token_hex(8)}"
