"""Tables of Lance, Delta and Iceberg, as a library of each writes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

__all__ = ["Delta", "Iceberg", "Lance", "Table"]


class Table(ABC):
    """A table of ten rows in each of its pieces."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def read(self, read: Callable[..., Any], **kwargs: Any) -> Any:
        """Call ``read`` as the reader of this kind of table."""

    @abstractmethod
    def append(self, ids: range) -> None: ...

    @abstractmethod
    def delete(self, row: int) -> None: ...

    @abstractmethod
    def compact(self) -> None: ...


class Lance(Table):
    """Its deletes are files beside a fragment."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.lance = pytest.importorskip("lance")
        self.uri = str(folder / "rows.lance")

    def read(self, read: Callable[..., Any], **kwargs: Any) -> Any:
        return read(ray.data.read_lance, self.uri, **kwargs)

    def append(self, ids: range) -> None:
        self.lance.write_dataset(rows(ids), self.uri, mode="append")

    def delete(self, row: int) -> None:
        self.lance.dataset(self.uri).delete(f"id = {row}")

    def compact(self) -> None:
        self.lance.dataset(self.uri).optimize.compact_files()

    def rename(self, column: str, name: str) -> None:
        self.lance.dataset(self.uri).alter_columns({"path": column, "name": name})


class Delta(Table):
    """A delete writes a file again."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.deltalake = pytest.importorskip("deltalake")
        self.path = str(folder / "delta")

    def read(self, read: Callable[..., Any], **kwargs: Any) -> Any:
        return read(ray.data.read_delta, self.path, **kwargs)

    def append(self, ids: range) -> None:
        self.deltalake.write_deltalake(self.path, rows(ids), mode="append")

    def delete(self, row: int) -> None:
        self.deltalake.DeltaTable(self.path).delete(f"id = {row}")

    def compact(self) -> None:
        self.deltalake.DeltaTable(self.path).optimize.compact()


class Iceberg(Table):
    """PyIceberg writes a file again for a delete, and has no compaction: a table is overwritten."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        sql = pytest.importorskip("pyiceberg.catalog.sql")
        uri, warehouse = f"sqlite:///{folder}/catalog.db", f"file://{folder}/warehouse"
        self.catalog = sql.SqlCatalog("default", uri=uri, warehouse=warehouse)
        self.catalog.create_namespace_if_not_exists("shop")
        self.table: Any = self.catalog.create_table_if_not_exists(
            "shop.rows", rows(range(0)).schema
        )
        self.options = {"type": "sql", "uri": uri, "warehouse": warehouse}

    def read(self, read: Callable[..., Any], **kwargs: Any) -> Any:
        return read(
            ray.data.read_iceberg,
            table_identifier="shop.rows",
            catalog_kwargs=self.options,
            **kwargs,
        )

    def append(self, ids: range) -> None:
        self.table.append(rows(ids))

    def delete(self, row: int) -> None:
        self.table.delete(f"id = {row}")

    def compact(self) -> None:
        self.table.overwrite(self.table.refresh().scan().to_arrow())

    def rename(self, column: str, name: str) -> None:
        with self.table.refresh().update_schema() as update:
            update.rename_column(column, name)


def rows(ids: range) -> pa.Table:
    texts = pa.array([f"row {i}" for i in ids], pa.string())
    return pa.table({"id": pa.array(ids, pa.int64()), "text": texts})
