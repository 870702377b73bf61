"""What arguments of readers and UDFs say: whether they repeat, and what of them is kept."""

from __future__ import annotations

import datetime as dt
import enum
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.data import FileShuffleConfig
from ray.data.datasource.partitioning import Partitioning, PartitionStyle

from ray_resume import NonResumableError, resumable_read
from ray_resume.core.plain_values import digest_of_value, is_secret
from ray_resume.read.options import describe_options, is_repeatable


class Decoder:
    def __call__(self, value: Any) -> Any:
        return value


REPEATABLE: list[dict[str, Any]] = [
    {"columns": ["a"], "include_paths": True, "override_num_blocks": 3},
    {"parse_options": pyarrow.csv.ParseOptions(delimiter="|")},
    {"convert_options": pyarrow.csv.ConvertOptions(column_types={"a": pa.int8()})},
    {"schema": pa.schema([("a", pa.int64())])},
    {"partitioning": Partitioning("hive", field_types={"a": int})},  # type: ignore[arg-type]
    {"shuffle": FileShuffleConfig(seed=1)},
    {"tensor_column_schema": {"a": (np.dtype("int8"), (2, 3)), "b": (np.int8, (2,))}},
    {"dataset_kwargs": {"read_dictionary": ["a"]}},
    {"decoder": True, "filesystem": object()},
]

NOT_REPEATABLE: list[dict[str, Any]] = [
    {"_block_udf": lambda block: block},
    {"parse_options": pyarrow.csv.ParseOptions(invalid_row_handler=lambda _: "skip")},
    {"decoder": [Decoder()]},
    {"decoder": Decoder},
    {"arrow_parquet_args": {"filter": {"deep": [lambda _: True]}}},
    {"open_stream_args": {"open": open}},
]


def name_of(arguments: dict[str, Any]) -> str:
    """Return a name that is the same in each of the processes that run tests."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(arguments))


@pytest.mark.parametrize("arguments", REPEATABLE, ids=name_of)
def test_data_alone_repeats(arguments: dict[str, Any]) -> None:
    assert is_repeatable(arguments)


@pytest.mark.parametrize("arguments", NOT_REPEATABLE, ids=name_of)
def test_what_runs_code_of_the_user_may_not_repeat(arguments: dict[str, Any]) -> None:
    assert not is_repeatable(arguments)
    assert describe_options(arguments, {}) == ""


def test_options_are_described_without_what_may_be_secret() -> None:
    described = describe_options(
        {
            "columns": ["b", "a"],
            "schema": pa.schema([("a", pa.int64())]),
            "paths": ["elsewhere"],
            "storage_options": {"key": "AKIA-storage"},
            "api_key": "sk-secret",
            "arrow_open_stream_args": {"compression": "gzip"},
            "encoding": "sk-in-disguise",
            "decoder": len,
            "size": None,
        },
        {},
    )
    assert described.startswith("columns=['b', 'a'], encoding=#")
    assert "schema=#" in described
    for secret in ("AKIA", "sk-", "elsewhere", "gzip", "decoder", "size"):
        assert secret not in described


def test_only_what_is_not_the_default_is_described() -> None:
    defaults = {
        "partitioning": Partitioning(PartitionStyle.HIVE),
        "include_paths": False,
        "columns": None,
    }
    given = {
        "partitioning": Partitioning(PartitionStyle.HIVE),
        "include_paths": False,
        "columns": None,
    }
    assert describe_options(given, defaults) == ""
    # That is another input: no columns from the names of folders.
    assert "partitioning" in describe_options({"partitioning": None}, defaults)
    assert "include_paths" in describe_options({"include_paths": True}, defaults)


@pytest.mark.parametrize(
    "name",
    [
        *["api_key", "apikey", "hf_token", "token", "password", "aws_secret_access_key", "headers"],
        *["credentials", "storage_options", "auth", "account_key", "db_connection", "PWD"],
    ],
)
def test_secret_names(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["key", "keys", "max_tokens", "tokenizer", "author", "columns"])
def test_other_names(name: str) -> None:
    assert not is_secret(name)


class Color(enum.Enum):
    RED = 1


@dataclass
class Settings:
    name: str
    values: list[int]


DISTINCT = [
    *[None, True, 1, 1.0, "1", b"1", float("nan"), [], (), {}, set(), [1], (1,), {1}, {1: 1}],
    *[dt.date(2026, 1, 1), dt.datetime(2026, 1, 1), Path("a"), "a", Color.RED, int, float],
    *[np.int64(1), np.int32(1), np.array([1, 2]), np.array([[1, 2]]), np.array(["x"], object)],
    *[Settings("a", [1]), Settings("a", [2]), pa.int64(), pa.schema([("a", pa.int64())]), "x" * 99],
]


def test_values_that_differ_have_other_digests() -> None:
    digests = [digest_of_value(value) for value in DISTINCT]
    assert None not in digests
    assert len(set(digests)) == len(DISTINCT)


def test_what_is_not_plain_has_none() -> None:
    endless: list[Any] = []
    endless.append(endless)
    for value in (object(), len, lambda: 0, [object()], {"a": open}, endless, Decoder()):
        assert digest_of_value(value) is None


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text(), inner)
        | st.frozensets(st.integers() | st.text())
    ),
)


@pytest.mark.long
@given(PLAIN)
def test_equal_values_have_equal_digests(value: Any) -> None:
    import copy

    assert digest_of_value(value) is not None
    assert digest_of_value(value) == digest_of_value(copy.deepcopy(value))


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_the_order_of_a_dict_does_not_count(value: dict[str, int]) -> None:
    assert digest_of_value(value) == digest_of_value(dict(reversed(value.items())))


def test_hashes_of_rows_are_refused_where_row_groups_would_repeat_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older reader of Ray's counts the rows of a row group from 0, beside the file's name."""
    monkeypatch.setattr(ray.data.DataContext.get_current(), "use_datasource_v2", False)
    with pytest.raises(NonResumableError, match="would get the same hash"):
        resumable_read(
            ray.data.read_parquet,
            str(tmp_path),
            checkpoint=tmp_path / "ckpt",
            granularity="row_group",
            include_row_hash=True,
        )
