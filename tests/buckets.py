"""An S3 server's address, as pyarrow wants it."""

from __future__ import annotations

from dataclasses import dataclass

from pyarrow.fs import FileSelector, FileSystem


@dataclass(frozen=True)
class S3:
    """A server on loopback; it takes any key."""

    port: int

    @property
    def options(self) -> str:
        return f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"

    def uri(self, path: str) -> str:
        """Spell ``bucket/...`` as a URI, with credentials."""
        return f"s3://key:secret@{path}?{self.options}"

    @property
    def filesystem(self) -> FileSystem:
        return FileSystem.from_uri(f"{self.uri('bucket')}&allow_bucket_creation=true")[0]

    def names(self, path: str) -> list[str]:
        """List the objects below ``path``, relative to it."""
        infos = self.filesystem.get_file_info(
            FileSelector(path, recursive=True, allow_not_found=True)
        )
        return sorted(info.path.removeprefix(f"{path}/") for info in infos if info.is_file)
