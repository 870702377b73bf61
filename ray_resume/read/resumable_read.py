"""``resumable_read``: list the sources of a read, and make a dataset that can be armed."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import ray.data
from ray.data import Dataset
from ray.data.datasource import Datasource

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.checkpoint import Checkpoint
from ray_resume.checkpoint.location import Location
from ray_resume.checkpoint.upstream import Upstream
from ray_resume.core.identity import ids_of
from ray_resume.core.planning import Policies
from ray_resume.core.read_schema import ReadSchema
from ray_resume.core.records import State
from ray_resume.core.shards import ArrayTask, Shard, shard_of
from ray_resume.core.sources import SourceTable
from ray_resume.errors import CheckpointError, NonResumableError
from ray_resume.raydata import guards
from ray_resume.raydata.table_reads import TABLE_READERS
from ray_resume.read.arguments import check_options
from ray_resume.read.datasource import ResumableDatasource
from ray_resume.read.datasource_input import DatasourceInput
from ray_resume.read.granularity import Cutting
from ray_resume.read.key_input import refuse_arguments
from ray_resume.read.options import ReaderText, check_reader, describe_reader
from ray_resume.read.overlap import InputFolders, filesystem_type, refuse_overlap
from ray_resume.read.planned_read import (
    PlannedRead,
    read_files,
    read_keys,
    read_table,
    share_of,
    with_fixed_schema,
)
from ray_resume.read.reader_files import arguments_of
from ray_resume.read.upstream import read_upstream

__all__ = ["ReadOptions", "resumable_read"]


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
    split_bytes: int | None = None,
    split_rows: int | None = None,
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
            * ``read_parquet``, ``read_json``, ``read_csv``, ``read_orc``, ``read_webdataset``,
              ``read_numpy`` or ``read_images`` with a :class:`Checkpoint` in place of paths: the
              output folder of another resumable pipeline. Its sources that have output are the
              sources here, with their ids. A source that was processed again there is processed
              again here; one that was reset, or is gone, is removed here. Files that were rewritten
              or merged are no change. Runs of that pipeline may go on: what is committed is read.
            * ``read_iceberg``, ``read_delta`` or ``read_lance``, with their own arguments. Each
              data file (Iceberg, Delta) or fragment (Lance) is a source. They are those of the
              snapshot that the reader finds, or is asked for, whatever others write meanwhile. One
              with deleted rows is processed again; one that was rewritten or compacted away is
              removed here. Reads over the whole table (``limit``, ``nearest``) are refused.
              Filters are made after reading, except for those in the arguments.
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
            ``<path>#rg<N>``. ``"split"`` makes sources of ranges of ``split_bytes`` of the files of
            ``read_json`` (a value a line), ``read_text`` and ``read_csv``, with the id
            ``<path>#bytes=<first>-<end>``: the lines that begin in it. Refused are
            compressed files, encodings in which other bytes than a newline may look like one,
            ``newlines_in_values=True``, and for CSV ``escape_char``, ``skip_rows`` and
            ``skip_rows_after_names``. It is known only when a file is read, and fails its sources,
            if its first line is no JSON object of its own (arrays, pretty printed JSON), if a
            quoted value of CSV goes on in another line or a value that is not quoted has a quote,
            or if columns of CSV have one name and different types. The types of JSON values are
            found in each split, as plain Ray Data finds them in each file: if that gives a column
            two types, name its own in ``parse_options``. ``"rows"`` makes sources of ranges of
            ``split_rows`` rows, in the order in which a file is read, of the files of any reader,
            with the id ``<path>#rows=<first>-<end>``. One task reads a file, from its start, and
            passes over the rows of completed ranges: no UDF sees them. It reads no file of which
            all is completed. How many ranges a file has is known once it was read to its end; until
            then ``<path>#rows=end/<split_rows>`` counts as one more source. Readers that run a
            function of yours are refused. Runs with different inputs do not work beside each other
            on one checkpoint; those of disjoint shards do. ``"auto"`` keeps files whole, but for
            those above 256 MiB: it makes row groups of Parquet files, splits of those of
            ``read_text`` and ``read_json`` (a value a line), and row ranges of all others. It may
            follow ``"file"``: completed files stay as they are. A file that has changed is changed
            as a whole.
        max_failed_runs: a source that failed in so many runs is quarantined: later runs skip it. A
            source fails if rows of it fail, if it cannot be read, or if it is lost although it is
            executed alone.
        on_source_change: what to do with a completed source whose size or modification time has
            changed (over HTTP: ``Last-Modified``, or ``ETag``, if the server gives one):
            ``"reprocess"`` (its new output replaces its old), ``"error"``
            (:class:`SourceChangedError`), ``"ignore"``. If a Parquet file has fewer row groups
            now, the run removes the output of those that are gone when it starts, and replaces the
            others one by one. Of row ranges it removes the output of all of the file's.
        on_source_gone: what to do about completed sources that are not in the input any more:
            ``"keep"`` their output, with a warning; ``"remove"`` it, in this run's shard, and
            forget those that have failed; or ``"error"`` (:class:`SourceChangedError`). The default
            is ``"keep"``, with two exceptions that are errors. One: no completed source is left,
            and everything listed is new. The other: new files have the name, size and modification
            time of files that are gone, so the same data would be in the output twice. Only a
            folder's files can be removed. Files that they shared with others are rewritten at the
            end of the run. Where another pipeline's checkpoint or a table is read, the default is
            ``"remove"``; only a checkpoint that has none of the completed sources is an error then.
            A run that removes works alone: it waits for every other run of its shard, and each
            input needs a checkpoint of its own.
        source_id: for a ``Datasource`` whose read tasks do not name one file each:
            ``source_id(read_task, index) -> str``, the same for the same rows in every run.
        source_root: makes ids of files relative to this directory, so that the checkpoint stays
            good when the data moves.
        split_bytes: how long splits are, 64 MiB by default; the same in each run. A read task holds
            one split in memory.
        split_rows: how many rows a row range has, 10,000 by default, and always with ``"auto"``;
            the same in each run.
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
    guards.refuse_ray_client()
    check_reader(reader, args, keyed=keys is not None)
    share = None if shard is None else shard_of(shard, os.environ)
    cutting = Cutting(granularity, split_bytes, split_rows)
    check_options(reader, keys, cutting, source_root, source_id)
    location = _location_of(checkpoint)
    storage = location.open()
    scheduling = {name: kwargs.pop(name) for name in _SCHEDULING & kwargs.keys()}
    upstream = None if keys is not None else _upstream_of(reader, args, kwargs)
    if upstream is not None:
        policies = replace(policies, follows_upstream=True)
        if granularity != "file" or source_root is not None:
            raise TypeError(
                "granularity and source_root are for files, and the sources of a checkpoint are "
                "those of its pipeline. Leave them out."
            )
        read = _read_upstream(reader, args, kwargs, upstream, own=storage.uri)
    elif keys is not None:
        read = read_keys(reader, keys, args, kwargs)
    elif isinstance(reader, Datasource):
        refuse_arguments(reader, args, kwargs)
        task_count = scheduling.get("override_num_blocks") or _CUSTOM_READ_TASKS
        read = PlannedRead("task", DatasourceInput.of(reader, source_id, task_count))
    elif reader.__name__ in TABLE_READERS:
        policies = replace(policies, follows_table=True)
        read = read_table(reader, args, kwargs)
    else:
        completed = partial(_completed, storage, policies)
        read = read_files(reader, args, kwargs, cutting, source_root, completed)
    kept = location.local_path
    of_type = "local" if kept else filesystem_type(location.path, location.filesystem)
    refuse_overlap(read.folders, "checkpoint", of_type, storage.root, storage.uri)
    storage.ensure()
    schema = None
    if read.sampled:
        read, schema = with_fixed_schema(read, storage.read_schemas().read())
    if isinstance(share, ArrayTask):
        share = Shard(storage.rank_of(share), share.count)
    sources = read.input.sources
    if share is not None:
        read, sources = share_of(read, share)
    text = describe_reader(reader, args, kwargs, name=read.input.name, keyed=keys is not None)
    ids = ids_of(read.kind, relative=source_root is not None, of=read.of)
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


def _location_of(checkpoint: str | os.PathLike[str] | Checkpoint) -> Location:
    if not isinstance(checkpoint, (str, os.PathLike, Checkpoint)):
        raise TypeError(
            "checkpoint must be a directory, a URI or a ray_resume.Checkpoint, not "
            f"a {type(checkpoint).__name__}."
        )
    location = Checkpoint(checkpoint).location
    if location.local_path is not None:
        guards.refuse_working_dir_copy(str(location.local_path))
    return location


def _upstream_of(reader: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Upstream | None:
    """Return the pipeline whose output is to be read; None if files are to be read.

    Raises:
        NonResumableError: a checkpoint is one of several paths.
    """
    if isinstance(reader, Datasource):
        return None
    if reader.__name__ in TABLE_READERS:
        if any(isinstance(one, Checkpoint) for one in (*args, *kwargs.values())):
            raise NonResumableError(
                f"{reader.__name__} reads a table, and the output of a checkpoint's pipeline is in "
                "files. Pass ray.data.read_parquet, or the reader of their format."
            )
        return None
    paths = arguments_of(reader, args, kwargs).get("paths")
    if isinstance(paths, Checkpoint):
        return Upstream(paths.location)
    if isinstance(paths, (list, tuple)) and any(isinstance(path, Checkpoint) for path in paths):
        raise NonResumableError(
            "A checkpoint as input stands alone, not in a list of paths: resumable_read("
            'ray.data.read_parquet, Checkpoint("stage1/ckpt"), checkpoint=...).'
        )
    return None


def _read_upstream(
    reader: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    upstream: Upstream,
    *,
    own: str,
) -> PlannedRead:
    """List the sources of another pipeline, and plan how the rows of their output are read."""
    if upstream.uri == own:
        raise CheckpointError(
            f"The pipeline would read the output of its own checkpoint {own}. Give it another "
            "checkpoint and another output folder than the pipeline before."
        )
    planned = read_upstream(
        reader,
        arguments_of(reader, args, kwargs),
        folder=upstream.folder(),
        current=upstream.sources,
        checkpoint=upstream.uri,
    )
    return PlannedRead(
        "upstream", planned.input, (), planned.columns, planned.folders, planned.sampled
    )


def _completed(
    storage: CheckpointBackend, policies: Policies, files: SourceTable
) -> npt.NDArray[np.bool_]:
    """Say which files are completed as a whole; not of those that are to be processed again."""
    try:
        snapshot = storage.snapshot().snapshot
    except CheckpointError:
        # There is none yet; or it cannot be used, which is found out when it is needed.
        return np.zeros(len(files), bool)
    rows = snapshot.find(files.digests)
    completed = rows >= 0
    completed[completed] = snapshot.in_state(State.COMPLETED)[rows[completed]]
    if policies.on_source_change == "reprocess":
        for position in np.flatnonzero(completed).tolist():
            seen = snapshot.record(int(rows[position])).fingerprint
            completed[position] = seen == files[position].fingerprint
    return completed
