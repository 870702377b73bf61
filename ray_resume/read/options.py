"""The arguments of a reader: whether it repeats itself, and which options it reads with.

Importable on workers: knows neither checkpoints nor lmdb.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow.csv
import pyarrow.fs
import pyarrow.json
import ray.data
from ray.data import Dataset
from ray.data.datasource import Datasource

from ray_resume.core.plain_values import NotPlainError, digest_of_value, is_secret, plain
from ray_resume.errors import NonResumableError
from ray_resume.raydata.table_reads import TABLE_READERS

__all__ = ["ReaderText", "check_reader", "describe_options", "describe_reader", "is_repeatable"]

# Whose values may be shown: they name columns, or switch something on. Others are shown as digests.
_SHOWN = {
    "columns",
    "include_paths",
    "include_row_hash",
    "mode",
    "size",
}

# Options that say where or how files are read, and do not change the rows.
_NOT_COMPARED = {
    "arrow_open_file_args",
    "arrow_open_stream_args",
    "catalog",
    "catalog_kwargs",
    "file_extensions",
    "filesystem",
    "ignore_missing_paths",
    "meta_provider",
    "open_stream_args",
    "parallelism",
    "partition_filter",
    "path",
    "paths",
    "scan_kwargs",
    "shuffle",
    "skip_paths",
    "snapshot_id",
    "storage_options",
    "table_identifier",
    "uri",
    "version",
}

_ARROWS: dict[type, tuple[str, ...]] = {
    pyarrow.csv.ReadOptions: (
        *("use_threads", "block_size", "skip_rows", "skip_rows_after_names", "column_names"),
        *("autogenerate_column_names", "encoding"),
    ),
    pyarrow.csv.ParseOptions: (
        *("delimiter", "quote_char", "double_quote", "escape_char", "newlines_in_values"),
        *("ignore_empty_lines", "invalid_row_handler"),
    ),
    pyarrow.csv.ConvertOptions: (
        *("check_utf8", "column_types", "null_values", "true_values", "false_values"),
        *("decimal_point", "strings_can_be_null", "quoted_strings_can_be_null"),
        *("include_columns", "include_missing_columns", "auto_dict_encode"),
        *("auto_dict_max_cardinality", "timestamp_parsers"),
    ),
    pyarrow.json.ReadOptions: ("use_threads", "block_size"),
    pyarrow.json.ParseOptions: (
        "explicit_schema",
        "newlines_in_values",
        "unexpected_field_behavior",
    ),
}


# Why readers of Ray Data's other than those of files and tables have no sources.
_WITHOUT_SOURCES = {
    "read_kafka": (
        "offsets say which messages were read, not what is in them, and a topic forgets its "
        "oldest ones. A key may be a topic, a partition, and the offsets where it starts and ends"
    ),
    "read_sql": (
        "a query gives its rows in any order, and other ones tomorrow. A key may be a day, or a "
        "range of a primary key, that the query is restricted to"
    ),
}

_READERS = (
    "Read files with one of Ray Data's readers for files (ray.data.read_parquet, read_csv, "
    "read_json, ...), or anything else by keys: resumable_read(load, keys=[...], checkpoint=...)."
)


def check_reader(reader: Any, args: tuple[Any, ...], *, keyed: bool) -> None:
    """Make sure that the first argument of `resumable_read` is a reader, before anything else.

    Args:
        keyed: whether it is to be called with each key.

    Raises:
        NonResumableError: it is something else, or has no sources that can be resumed. The message
            shows the call that was probably meant.
    """
    if isinstance(reader, Dataset):
        raise NonResumableError(
            "resumable_read got a dataset: its reader was called already. Pass the reader itself, "
            'with its arguments after it: resumable_read(ray.data.read_parquet, "in/", '
            "checkpoint=...)."
        )
    if isinstance(reader, Datasource) or (keyed and callable(reader)):
        return
    if isinstance(reader, type) and issubclass(reader, Datasource):
        raise NonResumableError(
            f"resumable_read got the class {reader.__name__}. Pass an object of it: "
            f"resumable_read({reader.__name__}(...), checkpoint=...)."
        )
    if isinstance(reader, functools.partial):
        raise NonResumableError(
            "resumable_read got a functools.partial. Pass the reader itself, with all of its "
            f"arguments after it: resumable_read({_public_name(reader.func)}, ..., checkpoint=...)."
        )
    if not callable(reader):
        # Two arguments in the wrong order, as a rule.
        readers = [_public_name(value) for value in args if callable(value)]
        raise NonResumableError(
            f"The first argument of resumable_read is a reader, not {reader!r:.80}. Pass the "
            f"reader first: resumable_read({(readers or ['ray.data.read_parquet'])[0]}, "
            f"{reader!r:.80}, checkpoint=...)."
        )
    name = getattr(reader, "__name__", repr(reader))
    rays = getattr(ray.data, name, None)
    if rays is reader and name in TABLE_READERS:
        return
    if name in _WITHOUT_SOURCES and rays is not None:
        raise NonResumableError(f"{name} cannot be resumed: {_WITHOUT_SOURCES[name]}. {_READERS}")
    if rays is None or "paths" not in inspect.signature(rays).parameters:
        raise NonResumableError(
            f"{name} has no sources that are the same in every run, so it cannot be resumed. "
            f"{_READERS}"
        )
    if rays is not reader:
        raise NonResumableError(
            f"{_public_name(reader)} is not one of Ray Data's readers. Did you mean "
            f"ray.data.{name}?"
        )


def _public_name(function: Any) -> str:
    """Return a function's name as a user would write it."""
    name = getattr(function, "__name__", type(function).__name__)
    if getattr(ray.data, name, None) is function:
        return f"ray.data.{name}"
    return f"{getattr(function, '__module__', '').partition('.')[0]}.{name}".lstrip(".")


class ReaderText(NamedTuple):
    """The reader in a pipeline's signature, and the user's functions that it calls, by name."""

    text: str
    udfs: tuple[tuple[str, Any], ...] = ()


def describe_reader(
    reader: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, name: str, keyed: bool
) -> ReaderText:
    """Describe a reader, and what it is called with.

    Args:
        name: what the read is called in a plan.
        keyed: whether it is a function that is called with each key.
    """
    text = f"read_{re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', name).lower()}"
    if keyed:
        return ReaderText(text, ((text, reader),))
    if isinstance(reader, Datasource):
        return ReaderText(text)
    signature = inspect.signature(reader)
    arguments = signature.bind(*args, **kwargs).arguments
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    defaults = {one.name: one.default for one in signature.parameters.values()}
    options = describe_options(arguments, defaults)
    functions = [(option, of) for option, of in sorted(arguments.items()) if callable(of)]
    udfs = tuple((f"{reader.__name__}({option})", of) for option, of in functions)
    return ReaderText(f"{reader.__name__}({options})" if options else reader.__name__, udfs)


def is_repeatable(arguments: Mapping[str, Any]) -> bool:
    """Say whether a reader of files gives the same rows in the same order each time.

    It may not if anything of the user's runs in it: a function, or an object of a class that is not
    known to be data, such as ``_block_udf``, a decoder, or a handler of invalid rows.
    """
    # File systems give the bytes of files, and whether those have changed is looked at.
    return all(_is_data(value) for name, value in arguments.items() if name != "filesystem")


def describe_options(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Format the options that decide on rows and columns, without anything that may be a secret.

    Values that are not plain data are left out: a function may be another one in each process. So
    are defaults, since it makes no difference whether they are given. None may be no default.
    """
    texts = []
    for name in sorted(arguments.keys() - _NOT_COMPARED):
        value = _opened(arguments[name])
        digest = digest_of_value(value)
        is_default = digest == digest_of_value(_opened(defaults.get(name)))
        if digest is None or is_default or is_secret(name):
            continue
        texts.append(f"{name}={value!r}" if name in _SHOWN else f"{name}=#{digest}")
    return ", ".join(texts)


def _is_data(value: Any) -> bool:
    try:
        plain(_opened(value))
    except NotPlainError:
        return False
    return True


def _opened(value: Any) -> Any:
    """Return an object of options as what is in it, and what holds one likewise."""
    names = _ARROWS.get(type(value))
    if names is not None:
        return {name: _opened(getattr(value, name, None)) for name in names}
    if type(value) is dict:
        return {name: _opened(inner) for name, inner in value.items()}
    return [_opened(inner) for inner in value] if type(value) is list else value
