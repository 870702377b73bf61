"""``resumable_read``: list the sources of a read, and make a dataset that can be armed."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray.data
from ray.data import Dataset

from ray_resume import plan
from ray_resume.checkpoint import Checkpoint
from ray_resume.datasource import FileRead, ResumableDatasource
from ray_resume.directory import CheckpointDirectory
from ray_resume.errors import NonResumableError
from ray_resume.listing import list_files, resolve

__all__ = ["ReadOptions", "resumable_read"]

# What plain Ray Data assumes of Parquet before it has sampled any file.
_INFLATION = {"read_parquet": 5.0}


@dataclass(frozen=True)
class ReadOptions:
    """The options of a read that a run must know."""

    max_failed_runs: int
    on_source_change: str
    on_pipeline_change: str


def resumable_read(
    reader: Callable[..., Dataset],
    *args: Any,
    checkpoint: str | os.PathLike[str] | Checkpoint,
    keys: Sequence[Any] | None = None,
    granularity: str = "file",
    shard: tuple[int, int] | str | None = None,
    max_failed_runs: int = 3,
    on_source_change: str = "reprocess",
    on_pipeline_change: str = "error",
    source_id: Callable[..., str] | None = None,
    source_root: str | None = None,
    **kwargs: Any,
) -> Dataset:
    """Read files as ``reader(*args, **kwargs)`` would, so that ``resumable_write`` can skip them.

    Lists the files and opens none. Used without ``resumable_write`` (``count``, ``take``,
    ``schema``, ``show``, ``materialize``), the dataset reads what plain Ray Data would, and touches
    no checkpoint.

    Args:
        reader: ``ray.data.read_parquet``; ``args`` and ``kwargs`` are its own.
        checkpoint: a directory on the driver's host, created if missing, or a :class:`Checkpoint`.
            Give each pipeline its own.
        max_failed_runs: a source that failed in so many runs is quarantined: passed over.
        on_source_change: what to do with a completed source whose size or modification time has
            changed: ``"reprocess"`` (its new output replaces its old), ``"error"``, ``"ignore"``.
        on_pipeline_change: reserved; this version does not compare pipelines yet.
        keys, granularity, shard, source_id, source_root: reserved; other values than the defaults
            are refused by this version.

    Raises:
        FileNotFoundError: there is nothing to read.
        CheckpointError: the checkpoint cannot be used.
        NonResumableError: the reader cannot be made resumable.
    """
    options = _checked_options(max_failed_runs, on_source_change, on_pipeline_change)
    _refuse_what_is_not_there_yet(
        keys=keys,
        granularity=granularity,
        shard=shard,
        source_id=source_id,
        source_root=source_root,
    )
    directory = CheckpointDirectory(checkpoint)
    name = getattr(reader, "__name__", repr(reader))
    if getattr(ray.data, name, None) is not reader or name not in _INFLATION:
        raise NonResumableError(
            f"resumable_read cannot read with {name} in this version; it reads with "
            f"{', '.join('ray.data.' + known for known in _INFLATION)}."
        )
    arguments = inspect.signature(reader).bind(*args, **kwargs).arguments
    # Extra keyword arguments of the reader arrive under the name of its ** parameter.
    for parameter in inspect.signature(reader).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    files = _list(reader, arguments)
    directory.ensure()

    scheduling = {key: arguments.pop(key) for key in _scheduling_names() if key in arguments}

    def open_files(paths: Sequence[str]) -> Any:
        return plan.plain_datasource(reader, paths, arguments)

    datasource = ResumableDatasource(
        FileRead(name.removeprefix("read_").title(), open_files, _INFLATION[name]),
        files,
        str(directory.path),
        options,
    )
    dataset: Dataset = ray.data.read_datasource(datasource, **scheduling)
    plan.refuse_plain_writes(dataset)
    return dataset


def _list(reader: Callable[..., Dataset], arguments: dict[str, Any]) -> Sequence[Any]:
    """List the files, and take out of ``arguments`` what that has settled."""
    if arguments.get("catalog") is not None:
        raise NonResumableError("resumable_read does not resolve catalogs. Give the paths.")
    defaults = inspect.signature(reader).parameters
    filesystem, paths = resolve(arguments.pop("paths"), arguments.get("filesystem"))
    skipped = arguments.pop("skip_paths", None) or []
    extensions = arguments.get("file_extensions", defaults["file_extensions"].default)
    partition_filter = arguments.pop("partition_filter", None)
    files = list_files(
        filesystem,
        paths,
        extensions=extensions,
        keep=partition_filter,
        ignore_missing=bool(arguments.pop("ignore_missing_paths", False)),
    )
    if skipped:
        without = set(resolve(skipped, filesystem)[1]) | set(resolve(skipped, None)[1])
        files = [file for file in files if file.path not in without]
    # The reader gets each file by name from here on.
    arguments["filesystem"] = filesystem
    arguments["file_extensions"] = None
    return files


def _scheduling_names() -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(ray.data.read_datasource).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]


def _refuse_what_is_not_there_yet(**options: Any) -> None:
    # Said aloud, since the reader would take an unknown keyword for an option of its own.
    for name, value in options.items():
        if value not in (None, "file"):
            raise NonResumableError(
                f"{name}={value!r}: this version of ray_resume does not have {name} yet."
            )


def _checked_options(
    max_failed_runs: int, on_source_change: str, on_pipeline_change: str
) -> ReadOptions:
    if max_failed_runs < 1:
        raise ValueError(f"max_failed_runs must be at least 1, not {max_failed_runs}")
    for name, value, known in (
        ("on_source_change", on_source_change, ("reprocess", "error", "ignore")),
        ("on_pipeline_change", on_pipeline_change, ("error", "continue", "restart")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    return ReadOptions(max_failed_runs, on_source_change, on_pipeline_change)
