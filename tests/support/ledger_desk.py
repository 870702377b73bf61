"""Calls of UDFs without a cluster: batches with sources, and a real ledger that is told of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from direct_client import DirectClient

from ray_resume.core.ledger import Ledger
from ray_resume.core.messages import DeadLetter, Drain, Event, Message, Seal
from ray_resume.core.tokens import MODULUS, token_sum, tokens
from ray_resume.raydata import blocks


class Desk(DirectClient):
    """Stands in for the connection to a ledger: applies what it is sent to a real one."""

    def __init__(self, sources: int) -> None:
        self.ledger = Ledger("run", sources)
        self.ledger.begin_pass(1)
        self.completed: set[int] = set()
        self.letters: list[DeadLetter] = []

    def send(self, *events: Event) -> None:
        applied = self.ledger.apply(Message("run", 1, events))
        self.completed |= {completion.source for completion in applied.completions}

    def submit_dead_letters(self, letters: Sequence[DeadLetter]) -> Any:
        self.letters += letters
        return self.submit(*(Drain(one.source, -one.total % MODULUS) for one in letters))

    def drain(self, sources: Any, values: Any) -> None:
        """Be told of rows that a sink has written: the source and the token of each."""
        for source in np.unique(sources).tolist():
            self.send(Drain(source, -token_sum(values[sources == source]) % MODULUS, 1))

    def buried(self) -> Counter[int]:
        """Count the rows in the dead letters by their ``x``."""
        tables = [pa.ipc.open_stream(letter.table).read_all() for letter in self.letters]
        return Counter(x for table in tables for x in table["x"].to_pylist())


def batch_of(sources: list[int], desk: Desk, form: str) -> Any:
    numbers = np.array(sources, dtype=np.int32)
    values = tokens(11, 0, len(sources))
    for source in range(max(sources) + 1):
        desk.send(Seal(source, token_sum(values[numbers == source])))
    rows: Any = {"x": np.arange(len(sources)), "deep": np.empty(len(sources), dtype=object)}
    rows["deep"][:] = [[x] for x in rows["x"]]
    if form == "pandas":
        rows = pd.DataFrame(rows)
    elif form == "pyarrow":
        rows = pa.table(rows)
    return blocks.with_tracking_columns(rows, numbers, values)


def x_of(batch: Any) -> list[int]:
    values: list[int] = np.asarray(blocks.column(batch, "x")).tolist()
    return values


def consume(result: Any, desk: Desk) -> Counter[int]:
    """Drain what a stage put out, as a sink does; count its rows by ``x``."""
    seen: Counter[int] = Counter()
    for output in list(result) if isinstance(result, Iterator) else [result]:
        rows, sources, values = blocks.split_tracking_columns(output)
        desk.drain(sources, values)
        if len(sources):
            seen.update(x_of(rows))
    return seen
