"""An S3 server's address, as pyarrow wants it."""

from __future__ import annotations

from dataclasses import dataclass

from pyarrow.fs import FileSelector, FileSystem


@dataclass(frozen=True)
class S3:
    """A server on loopback, which takes any key, and a bucket that no other session has."""

    port: int
    bucket: str

    def key(self, path: str) -> str:
        """Spell ``path`` in the bucket as the filesystem does."""
        return f"{self.bucket}/{path}"

    def uri(self, path: str) -> str:
        """Spell ``path`` in the bucket as a URI, with credentials."""
        options = f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"
        return f"s3://key:secret@{self.key(path)}?{options}"

    @property
    def filesystem(self) -> FileSystem:
        return FileSystem.from_uri(f"{self.uri('')}&allow_bucket_creation=true")[0]

    def names(self, path: str) -> list[str]:
        """List the objects below ``path``, relative to it."""
        base = self.key(path)
        selector = FileSelector(base, recursive=True, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(info.path.removeprefix(f"{base}/") for info in infos if info.is_file)
