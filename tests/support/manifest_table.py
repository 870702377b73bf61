"""A datasink that publishes in one step at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.data.datasource import Datasink


class Table(Datasink[Any]):
    """As Lance and Iceberg do it: a manifest names the parts."""

    def __init__(self, folder: Path, fail: str = "", mode: Any = "append") -> None:
        self.folder, self.fail, self.mode = folder, fail, mode

    def on_write_start(self, schema: Any = None) -> None:
        # Ray knows no schema where it fuses the read with the write.
        assert schema is None or schema.names == ["id", "name", "weight"]
        self.folder.mkdir(exist_ok=True)

    def write(self, blocks: Any, ctx: Any) -> str:
        part = self.folder / f"part-{ctx.kwargs['write_uuid']}"
        assert not part.exists()
        rows = [int(i) for block in blocks for i in block["id"].to_pylist()]
        if self.fail == "write" and 300 in rows:
            raise RuntimeError("a bad row")
        part.write_text(" ".join(map(str, rows)))
        return part.name

    def on_write_failed(self, error: Exception) -> None:
        with (self.folder / "failures").open("a") as file:
            file.write(f"{type(error).__name__} {len(self.rows())}\n")

    def on_write_complete(self, write_result: Any) -> None:
        if self.fail == "before":
            raise RuntimeError("the catalog is down")
        with (self.folder / "manifest").open("a") as file:
            file.writelines(f"{part}\n" for part in write_result.write_returns)
        if self.fail == "after":
            raise RuntimeError("the answer got lost")

    def rows(self) -> list[int]:
        manifest = self.folder / "manifest"
        parts = manifest.read_text().split() if manifest.exists() else []
        return sorted(int(i) for part in parts for i in (self.folder / part).read_text().split())
