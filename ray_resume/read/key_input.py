"""Keys as an input: a function of the user's reads each of them."""

from __future__ import annotations

import datetime as dt
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
from ray.data.block import BlockAccessor
from ray.data.datasource import ReadTask
from typing_extensions import override

from ray_resume.core.sources import Source, SourceTable, refuse_repeated
from ray_resume.errors import ResumeError
from ray_resume.raydata import user_batches
from ray_resume.raydata.filereads import ReadTaskFactory, Selection
from ray_resume.read.inputs import Input, unknown_metadata

__all__ = ["KeyInput", "key_sources", "refuse_arguments"]


@dataclass(frozen=True)
class KeyInput(Input):
    """Keys, read by a function of the user's: ``load(key)`` returns or yields tables.

    It is not repeatable: a database may give its rows in another order each time.
    """

    name: str
    sources: SourceTable
    load: Callable[[Any], Any]

    @override
    def open(
        self, sources: SourceTable, selection: Selection, data_context: Any
    ) -> tuple[Callable[[range], ReadTaskFactory], Selection]:
        return lambda _: _KeyTasks(self.load), selection


@dataclass(frozen=True)
class _KeyTasks:
    load: Callable[[Any], Any]

    def __call__(self, sources: SourceTable) -> Sequence[ReadTask]:
        return [
            ReadTask(_KeyRead(self.load, source.item), unknown_metadata()) for source in sources
        ]


@dataclass(frozen=True)
class _KeyRead:
    load: Callable[[Any], Any]
    key: Any

    def __call__(self) -> Iterator[Any]:
        result = self.load(self.key)
        parts = result if inspect.isgenerator(result) else [result]
        for part in parts:
            if part is None:
                continue
            if not isinstance(part, (pa.Table, pd.DataFrame, Mapping)):
                raise TypeError(
                    f"{self.load!r} returned a {type(part).__name__} for {self.key!r}; it must "
                    "return or yield a pyarrow.Table, a pandas.DataFrame or a dict of arrays."
                )
            # The loader may fill it again for the next part, or the next key.
            yield BlockAccessor.batch_to_block(user_batches.materialized(part))


def key_sources(keys: Iterable[Any]) -> SourceTable:
    """Make a source of each key: strings as they are, other plain values as they are written.

    Raises:
        ResumeError: two keys are the same, or one has no stable form as text.
    """
    sources = SourceTable.of(Source(_key_id(key), key) for key in keys)
    refuse_repeated(sources)
    return sources


def _key_id(key: Any) -> str:
    if isinstance(key, str):
        return key
    try:
        return json.dumps(key, sort_keys=True, default=_format)
    except TypeError as error:
        raise ResumeError(
            f"The key {key!r} has no form as text that is the same in every run ({error}). Use "
            "strings, numbers, dates, and lists, tuples or dicts of these."
        ) from None


def _format(value: Any) -> str:
    if isinstance(value, (dt.date, dt.datetime, dt.time)):
        return value.isoformat()
    raise TypeError(f"it has a {type(value).__name__} in it")


def refuse_arguments(reader: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Make sure that nothing is passed on to what takes a key alone, or nothing."""
    if args or kwargs:
        raise TypeError(
            f"resumable_read calls {getattr(reader, '__name__', type(reader).__name__)} with each "
            "key alone, or reads a Datasource as it is. It has no use for "
            f"{', '.join([*map(repr, args), *(f'{name}={kwargs[name]!r}' for name in kwargs)])}."
        )
