"""``resumable_read``: list the sources of a read, and make a dataset that can be armed."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data
from pyarrow.fs import FileSystem, LocalFileSystem
from ray.data import Dataset
from ray.data.datasource import Datasource

from ray_resume.checkpoint.checkpoint import Checkpoint
from ray_resume.core.identity import ids_of
from ray_resume.core.planning import Policies
from ray_resume.core.read_schema import ReadSchema
from ray_resume.core.shards import ArrayTask, Shard, shard_of
from ray_resume.core.sources import SourceTable
from ray_resume.errors import NonResumableError
from ray_resume.raydata import guards
from ray_resume.raydata.paths import is_http, is_local_scheme
from ray_resume.raydata.scans import Scan, reads_with_scans, scanned_extensions
from ray_resume.read.datasource import ResumableDatasource
from ray_resume.read.datasource_input import DatasourceInput
from ray_resume.read.fixed_schema import fixed_schema
from ray_resume.read.footers import list_row_groups
from ray_resume.read.inputs import FileInput, Input, file_reader_of
from ray_resume.read.key_input import KeyInput, key_sources
from ray_resume.read.listing import list_files, relative_to
from ray_resume.read.options import ReaderText, check_reader, describe_reader, is_repeatable
from ray_resume.read.overlap import InputFolders, filesystem_type, refuse_overlap
from ray_resume.read.paths import PlainPaths, id_of_url, located, normalized, resolve
from ray_resume.read.workdir import local_at

__all__ = ["ReadOptions", "resumable_read"]

# Bytes in memory for a byte on disk, where the reader does not tell: those of Parquet, as plain Ray
# Data takes them before it has sampled any file. Only a parallelism depends on it.
_INFLATION = 5.0

# How many tasks a user's own datasource is asked for, in every run, whatever the cluster.
_CUSTOM_READ_TASKS = 200


@dataclass(frozen=True)
class ReadOptions:
    """The facts about a read that a run needs: see `planning.Listing` and `planning.Policies`."""

    policies: Policies
    shard: Shard | None
    reader: ReaderText
    ids: str
    files: Collection[str] = ()
    # The folders of the files, if files are read.
    inputs: InputFolders | None = None
    # The schema of the read, if it is that of some of the files.
    schema: ReadSchema | None = None


def resumable_read(
    reader: Callable[..., Any] | Datasource,
    *args: Any,
    checkpoint: str | os.PathLike[str] | Checkpoint,
    keys: Sequence[Any] | None = None,
    granularity: str = "file",
    shard: tuple[int | str, int] | str | None = None,
    max_failed_runs: int = 3,
    on_source_change: str = "reprocess",
    on_source_gone: str | None = None,
    on_pipeline_change: str = "error",
    on_code_change: str = "warn",
    source_id: Callable[..., str] | None = None,
    source_root: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Dataset:
    """Read as plain Ray Data would, so that ``resumable_write`` can skip what is done.

    It lists the sources. For Parquet it opens the footers of the first 16 files, as plain Ray Data
    does, and takes the schema of the read from them (``granularity="row_group"`` reads all
    footers). The checkpoint keeps that schema: later runs read with it, widened by what repaired or
    added files among the first 16 have more, and a warning says so. Without ``resumable_write``
    (``count``, ``take``, ``schema``, ``show``, ``materialize``), the dataset reads as plain Ray
    Data would, with that schema, and changes no checkpoint.

    Args:
        reader: one of

            * a ``ray.data.read_*`` function for files; ``args`` and ``kwargs`` are its own. Each
              file is a source, whose id is its path, or its URL without user, password and
              signature. A path that Ray cannot resolve is an error (it logs that, and goes on).
            * with ``keys``, any function ``load(key)`` that returns or yields tables, DataFrames or
              dicts of arrays. Each key is a source; ``kwargs`` are those of
              ``ray.data.read_datasource``.
            * a ``ray.data.Datasource``. Each of its read tasks is a source; it is asked for
              ``override_num_blocks`` tasks (200 by default) in every run.
        checkpoint: a directory, or a URI of any storage that pyarrow knows, created if missing; or
            a :class:`Checkpoint`, which has more options. Give each pipeline its own.
        keys: strings, numbers, dates, and lists, tuples or dicts of these, without repeats. A list
            that has grown since the last run processes what is new.
        granularity: ``"row_group"`` makes each row group of a Parquet file a source, with the id
            ``<path>#rg<N>``.
        max_failed_runs: a source that failed in so many runs is quarantined: later runs skip it. A
            source fails if rows of it fail, if it cannot be read, or if it is lost although it is
            executed alone.
        on_source_change: what to do with a completed source whose size or modification time has
            changed (over HTTP: ``Last-Modified``, or ``ETag``, if the server gives one):
            ``"reprocess"`` (its new output replaces its old), ``"error"``
            (:class:`SourceChangedError`), ``"ignore"``. If a Parquet file has fewer row groups
            now, the run removes the output of those that are gone when it starts, and replaces the
            others one by one.
        on_source_gone: what to do about completed sources that are not in the input any more:
            ``"keep"`` their output, with a warning; ``"remove"`` it, in this run's shard; or
            ``"error"`` (:class:`SourceChangedError`). The default is ``"keep"``, with two
            exceptions that are errors. One: no completed source is left, and everything listed is
            new. The other: new files have the name, size and modification time of files that are
            gone, so the same data would be in the output twice. Only a folder's files can be
            removed. Files that they shared with others are rewritten at the end of the run. A run
            that removes works alone: it waits for every other run of its shard, and each input
            needs a checkpoint of its own.
        source_id: for a ``Datasource`` whose read tasks do not name one file each:
            ``source_id(read_task, index) -> str``, the same for the same rows in every run.
        source_root: makes ids of files relative to this directory, so that the checkpoint stays
            good when the data moves.
        on_pipeline_change: what to do if completed sources went through another pipeline: another
            reader or other options of it (``columns=``), other operators, filters and columns,
            other names of UDFs or other plain values as their arguments, another format, other
            write options or ``partition_cols``. ``"error"``: :class:`PipelineChangedError`, which
            shows both; ``resumable_write`` raises it before anything runs. ``"continue"``: they
            stay as they are. ``"restart"``: they are processed again, and so is what was
            quarantined; the new output replaces the old. Arguments whose names say that they are
            credentials (``api_key``, ``token``, ``storage_options``) are not compared, and of
            others the checkpoint keeps digests.
        on_code_change: what to do if completed sources went through the same pipeline with other
            code of its UDFs (their bytecode, and the plain values, functions, decorators and
            objects of their module that they use; not libraries or models). ``"warn"``: one warning
            says how many, and of which UDFs; they stay as they are. ``"reprocess"``: as
            ``"restart"``; after an upgrade of Python all code counts as other code. ``"ignore"``:
            no warning.
        shard: read one share of the sources only, by a stable hash of the id; the dataset has no
            others. ``(index, count)`` with ``0 <= index < count``, or ``"slurm"``: this array
            task's share (array indexes may start anywhere and have gaps). PBS and LSF do not say
            how many tasks an array has: ``("pbs", count)``, ``("lsf", count)``. ``"torchrun"``
            takes RANK and WORLD_SIZE. Runs of different shards of one count may work at once on
            one checkpoint and one output. Completed sources stay completed with any other count,
            or none.

    Raises:
        FileNotFoundError: there is nothing to read.
        CheckpointError: the checkpoint cannot be used.
        NonResumableError: the reader cannot be made resumable.
        ResumeError: two sources have the same id; ``shard`` names a scheduler, and the
            environment is not that of one of its array tasks; the driver is a Ray Client.
    """
    policies = Policies(
        on_source_change,
        on_pipeline_change,
        on_source_gone,
        on_code_change,
        max_failed_runs=max_failed_runs,
    )
    _check_policies(policies)
    guards.refuse_ray_client()
    check_reader(reader, args, keyed=keys is not None)
    share = None if shard is None else shard_of(shard, os.environ)
    _check_options(reader, keys, granularity, source_root, source_id, checkpoint)
    location = Checkpoint(checkpoint).location
    storage = location.open()
    if location.local_path is not None:
        guards.refuse_working_dir_copy(str(location.local_path))
    scheduling = {name: kwargs.pop(name) for name in _SCHEDULING & kwargs.keys()}
    if keys is not None:
        read = _read_keys(reader, keys, args, kwargs)
    elif isinstance(reader, Datasource):
        _refuse_arguments(reader, args, kwargs)
        task_count = scheduling.get("override_num_blocks") or _CUSTOM_READ_TASKS
        read = _Read("task", DatasourceInput.of(reader, source_id, task_count))
    else:
        read = _read_files(reader, args, kwargs, granularity, source_root)
    kept = location.local_path
    of_type = "local" if kept else filesystem_type(location.path, location.filesystem)
    refuse_overlap(read.folders, "checkpoint", of_type, storage.root, storage.uri)
    storage.ensure()
    schema = None
    if read.sampled:
        read, schema = _with_fixed_schema(read, storage.read_schemas().read())
    if isinstance(share, ArrayTask):
        share = Shard(storage.rank_of(share), share.count)
    sources = read.input.sources
    if share is not None:
        sources = sources.take(np.flatnonzero(share.of(sources.digests)))
    text = describe_reader(reader, args, kwargs, name=read.input.name, keyed=keys is not None)
    ids = ids_of(read.kind, relative=source_root is not None)
    options = ReadOptions(policies, share, text, ids, read.files, read.folders, schema)
    datasource = ResumableDatasource(read.input, sources, location, options)
    dataset: Dataset = ray.data.read_datasource(datasource, **scheduling)
    guards.refuse_plain_writes(dataset)
    # Ray Data plans `columns=` like this, too.
    return dataset if read.columns is None else dataset.select_columns(read.columns)


# The options of a read that say how it runs, not what it reads.
_SCHEDULING = {
    name
    for name, parameter in inspect.signature(ray.data.read_datasource).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}


class _Read(NamedTuple):
    """An input, and what comes with it.

    Attributes:
        kind: what each source is, as `identity.ids_of` takes it.
        files: the ids of the files that sources are parts of, if they are.
        columns: what Ray Data selects above the read, if anything.
        folders: where the files are, if files are read.
        sampled: the paths of the files that the schema of the read comes from, if it has one.
    """

    kind: str
    input: Input
    files: Collection[str] = ()
    columns: list[str] | None = None
    folders: InputFolders | None = None
    sampled: Sequence[str] = ()


def _with_fixed_schema(read: _Read, recorded: Sequence[pa.Schema]) -> tuple[_Read, ReadSchema]:
    """Have files read with a schema that is also that of earlier runs."""
    assert isinstance(read.input, FileInput)
    assert isinstance(read.input.files, Scan)
    scan = read.input.files
    schema = fixed_schema(scan, recorded, read.input.filesystem, read.sampled)
    files_input = replace(read.input, files=scan.with_schema(schema.used))
    return read._replace(input=files_input), schema


def _read_keys(
    load: Any, keys: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Read:
    _refuse_arguments(load, args, kwargs)
    if isinstance(load, Datasource) or not callable(load):
        raise NonResumableError(f"keys= needs a function load(key), not {load!r}.")
    return _Read("key", KeyInput(getattr(load, "__name__", "Keys"), key_sources(keys), load))


def _check_row_groups(name: str, arguments: Mapping[str, Any]) -> None:
    if name != "read_parquet":
        raise NonResumableError('granularity="row_group" is for ray.data.read_parquet alone.')
    if arguments.get("include_row_hash") and not reads_with_scans(name):
        raise NonResumableError(
            "include_row_hash=True counts the rows of what is read at once, so with "
            'granularity="row_group" rows of two row groups would get the same hash. Read whole '
            "files, or with the Parquet reader of Ray 2.60 (DataContext.use_datasource_v2)."
        )


def _read_files(
    reader: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    granularity: str,
    source_root: str | os.PathLike[str] | None,
) -> _Read:
    """List the files, and plan how they are read."""
    name = reader.__name__
    signature = inspect.signature(reader)
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(f"ray.data.{name}: {error}") from None
    # Extra keyword arguments of the reader arrive under the name of its ** parameter.
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    if granularity == "row_group":
        _check_row_groups(name, arguments)
    distributed = not is_local_scheme(arguments["paths"])
    listed = _list(name, signature, arguments)
    sources = listed.sources
    if source_root is not None:
        (root,) = resolve(os.fspath(source_root), listed.filesystem)[1]
        http = is_http(listed.filesystem)
        sources = relative_to(sources, id_of_url(root) if http else root)
    title = name.removeprefix("read_").replace("_", " ").title().replace(" ", "")
    files, columns, sampled = file_reader_of(title, reader, arguments, listed.opened_on, sources)
    names: list[str] = []
    if granularity == "row_group":
        names = list(sources.ids())
        sources = list_row_groups(listed.opened_on, sources)
    files_input = FileInput(
        title,
        sources,
        files,
        files.inflation() or _INFLATION,
        listed.opened_on,
        repeatable=is_repeatable(arguments),
        distributed=distributed,
        selects=name == "read_parquet",
    )
    return _Read(granularity, files_input, names, columns, listed.folders, sampled)


class _Listed(NamedTuple):
    """The files of a read, whose items are paths on ``opened_on``, as plain Ray Data has them."""

    filesystem: FileSystem
    opened_on: FileSystem
    sources: SourceTable
    folders: InputFolders


def _list(name: str, signature: inspect.Signature, arguments: dict[str, Any]) -> _Listed:
    """List the files, and take out of ``arguments`` what only the listing needs."""
    if arguments.get("catalog") is not None:
        raise NonResumableError("resumable_read does not resolve catalogs. Give the paths.")
    given = arguments.get("filesystem")
    opened_on, plain = located(arguments.pop("paths"), given)
    filesystem, roots = normalized(opened_on, plain)
    scanned = reads_with_scans(name)
    if name == "read_parquet" and not scanned:
        # To plan, Ray's older reader opens files on workers, which may have another folder.
        opened_on, plain = filesystem, roots
    plain_paths = PlainPaths(tuple(roots), tuple(plain))
    skipped = arguments.pop("skip_paths", None)
    extensions = arguments.get("file_extensions", _default(signature, "file_extensions"))
    if scanned:
        extensions = scanned_extensions(extensions)
    sources = list_files(
        filesystem,
        roots,
        extensions=extensions,
        keep=_keeping(arguments.pop("partition_filter", None), plain_paths),
        ignore_missing=bool(arguments.pop("ignore_missing_paths", False)),
    )
    if skipped:
        without = set(resolve(skipped, filesystem)[1])
        sources = sources.take(np.flatnonzero([source.item not in without for source in sources]))
    folders = InputFolders.of(filesystem, roots, _paths(sources, filesystem))
    if not is_http(filesystem) and not plain_paths.is_identity:
        sources = sources.found_by(plain_paths.items(sources.ids()))
    # The reader gets each file by name from here on.
    if not isinstance(filesystem, LocalFileSystem) or given is not None:
        arguments["filesystem"] = opened_on
    if isinstance(opened_on, LocalFileSystem) and not all(map(os.path.isabs, plain)):
        opened_on = local_at(os.getcwd())
    if "file_extensions" in signature.parameters and not scanned:
        arguments["file_extensions"] = None
    return _Listed(filesystem, opened_on, sources, folders)


def _paths(sources: SourceTable, filesystem: FileSystem) -> Iterator[str]:
    # Ids are the same as items, in a third of the time, but for URLs.
    return (source.item for source in sources) if is_http(filesystem) else sources.ids()


def _keeping(
    keep: Callable[[list[str]], list[str]] | None, plain_paths: PlainPaths
) -> Callable[[list[str]], list[str]] | None:
    """Return a partition filter for listed paths, made of one for plain paths."""
    if keep is None or plain_paths.is_identity:
        return keep

    def kept(names: list[str]) -> list[str]:
        plain = plain_paths.of(names)
        left = set(keep(plain))
        return [name for name, path in zip(names, plain, strict=True) if path in left]

    return kept


def _default(signature: inspect.Signature, name: str) -> Any:
    parameter = signature.parameters.get(name)
    return None if parameter is None else parameter.default


def _refuse_arguments(reader: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if args or kwargs:
        raise TypeError(
            f"resumable_read calls {getattr(reader, '__name__', type(reader).__name__)} with each "
            "key alone, or reads a Datasource as it is. It has no use for "
            f"{', '.join([*map(repr, args), *(f'{name}={kwargs[name]!r}' for name in kwargs)])}."
        )


def _check_options(
    reader: Any,
    keys: Sequence[Any] | None,
    granularity: str,
    source_root: Any,
    source_id: Any,
    checkpoint: Any,
) -> None:
    if granularity not in ("file", "row_group"):
        raise ValueError(f'granularity must be "file" or "row_group", not {granularity!r}')
    if not isinstance(checkpoint, (str, os.PathLike, Checkpoint)):
        raise TypeError(
            "checkpoint must be a directory, a URI or a ray_resume.Checkpoint, not "
            f"a {type(checkpoint).__name__}."
        )
    reads_files = keys is None and not isinstance(reader, Datasource)
    if not reads_files and (granularity != "file" or source_root is not None):
        raise TypeError("granularity and source_root are for ray.data's readers for files alone.")
    if source_id is not None and (keys is not None or not isinstance(reader, Datasource)):
        raise TypeError(
            "source_id is for a Datasource alone; files and keys have ids of their own."
        )


def _check_policies(policies: Policies) -> None:
    if policies.max_failed_runs < 1:
        raise ValueError(f"max_failed_runs must be at least 1, not {policies.max_failed_runs}")
    for name, known in (
        ("on_source_change", ("reprocess", "error", "ignore")),
        ("on_pipeline_change", ("error", "continue", "restart")),
        ("on_code_change", ("warn", "reprocess", "ignore")),
        ("on_source_gone", (None, "keep", "remove", "error")),
    ):
        value = getattr(policies, name)
        if value not in known:
            words = ", ".join(word for word in known if word is not None)
            raise ValueError(f"{name} must be one of {words}, not {value!r}")
