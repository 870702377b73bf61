"""One execution of a pipeline: a run, whose passes are armed copies of the user's dataset.

Runs in the driver. The user's dataset and its context stay as they are.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ray.data import Dataset
from ray.exceptions import RayError, RayTaskError

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.core.file_count import count_after
from ray_resume.core.planning import Listing
from ray_resume.core.stages import Stage
from ray_resume.errors import ResumeError
from ray_resume.raydata import arming, guards
from ray_resume.raydata.bars import Bar, has_bars
from ray_resume.raydata.capacity import check_capacity, free_tail, needs_of
from ray_resume.raydata.pacing import pace
from ray_resume.raydata.parallelism import detected_read_tasks
from ray_resume.raydata.plan import Chain, method_of
from ray_resume.raydata.pool_watch import watch_pools
from ray_resume.raydata.signature import Signature, signature_of
from ray_resume.raydata.task_retries import bound_retries
from ray_resume.raydata.write_steps import release_written_blocks
from ray_resume.read.datasource import ArmedDatasource, ResumableDatasource
from ray_resume.read.row_input import ArmedRows, RowInput
from ray_resume.run.announcing import announce_end
from ray_resume.run.display import BarDisplay, Display, LogDisplay, show_log
from ray_resume.run.pass_loop import Pass
from ray_resume.run.run import Run
from ray_resume.run.run_plan import RunPlan
from ray_resume.run.summary import RunSummary
from ray_resume.udf.stage import instrument, instrument_predicate, stage_of, version_of
from ray_resume.write.flushes import table_intervals
from ray_resume.write.targets import Target

__all__ = ["Execution"]

logger = logging.getLogger("ray_resume")

# Beyond so many, a read task for each source would cost more than it tells.
_MOST_ISOLATED = 1000

# How often Ray retries a task whose worker died: nodes come and go, but a row that kills its worker
# kills the next one too.
_RETRIES = 3
_RETRIES_ALONE = 1

# Rows may wait so long in each step of a task, before they wait in the sink.
_LONGEST_WAIT_IN_STEP_S = 1.0


class Execution:
    """A pipeline, its target and how to execute it; call :meth:`run` once.

    Args:
        chain: the pipeline, as `raydata.plan.validate` returned it.
        target: where the rows go.
        commit_interval_s: rows wait at most so long before they are written.
        publish_interval_s: rows wait about so long before a table shows them.
        concurrency: how many write tasks may run at once; None leaves it to Ray Data.
        ray_remote_args: the user's, for the write tasks.
        progress: whether to show how far the run is; None shows it as Ray Data's context says.
    """

    def __init__(
        self,
        chain: Chain,
        target: Target,
        *,
        commit_interval_s: float,
        publish_interval_s: float,
        concurrency: int | None,
        ray_remote_args: Mapping[str, Any],
        progress: bool | None = None,
    ) -> None:
        self._optimized = chain.optimized()
        datasource = self._optimized.datasource
        assert isinstance(datasource, ResumableDatasource)
        self._datasource = datasource
        self._target = target
        self._read_tasks = chain.read_tasks
        self._commit_interval_s = commit_interval_s
        self._publish_interval_s = publish_interval_s
        self._concurrency = concurrency
        self._ray_remote_args = ray_remote_args
        self._progress = progress
        self._has_begun = False
        self._stats: list[str] = []
        self._executed = self._optimized
        self._most_writes: int | None = None

    def run(self, lease_wait_s: float | None) -> RunSummary:
        """Execute the pipeline as one run, and tell the target how it ended.

        Args:
            lease_wait_s: how many seconds to wait for another run on the same sources.

        Raises:
            Exception: as ``resumable_write``.
        """
        show_log(always=bool(self._progress))
        self._fit_cluster()
        signature = self._signature()
        # `drop_columns` selects all other columns of the input, with new ones among them.
        alike = [self._signature(names).text for names in self._names_added() if names]
        storage = self._datasource.checkpoint.open()
        plan = self._plan(storage, signature, alike)
        run = Run(plan)
        has_ended_well = False
        moved: Mapping[str, str] = {}
        try:
            summary = run.execute(self._execute_pass, lease_wait_s=lease_wait_s)
            has_ended_well = True
        except Exception as error:
            # As plain Ray Data does, but once a run: the results of its passes were published.
            if self._has_begun and self._target.failed is not None:
                self._target.failed(error)
            raise
        finally:
            # A run that was refused leaves the output alone: its folder or layout may be wrong.
            if self._target.ended is not None and (self._has_begun or has_ended_well):
                try:
                    moved = self._target.ended(storage)
                except (ResumeError, RayError, OSError) as error:
                    logger.warning("The output stays untidy until the next run ends: %s", error)
        files = count_after(summary.files, summary.run_id, moved)
        summary = replace(summary, files=files, stats="\n".join(self._stats))
        announce_end(plan, summary)
        return summary

    def _fit_cluster(self) -> None:
        """Find out whether the cluster can run the pipeline, and what it has left for the writes.

        Raises:
            NonResumableError: it cannot.
        """
        read = self._datasource
        if not read.sources:
            return
        size_bytes, context = read.estimate_inmemory_data_size(), self._optimized.dataset.context
        tasks = self._read_tasks or min(len(read.sources), detected_read_tasks(size_bytes, context))
        # The UDFs are not run.
        planned = arming.arm(self._optimized, read, tasks, lambda _, udf: udf, lambda _: id)
        needs = needs_of(planned)
        check_capacity(needs)
        self._executed, self._most_writes = free_tail(self._optimized, needs, tasks)

    def _names_added(self) -> list[list[str]]:
        schema = self._datasource.options.schema
        return [] if schema is None else schema.names_added()

    def _signature(self, new_names: Collection[str] = ()) -> Signature:
        datasource = self._datasource
        return signature_of(
            self._optimized,
            read=datasource.options.reader.text,
            read_udfs=datasource.options.reader.udfs,
            predicates=datasource.predicates,
            columns=datasource.selected_columns,
            input_names=datasource.column_names,
            write=self._target.described,
            new_names=new_names,
            version_of=version_of,
        )

    def _plan(
        self, storage: CheckpointBackend, signature: Signature, alike: Collection[str]
    ) -> RunPlan:
        datasource = self._datasource
        split_rows = None
        if isinstance(datasource.input, RowInput):
            split_rows = datasource.input.split_rows
        _, publish_interval_s = table_intervals(self._commit_interval_s, self._publish_interval_s)
        return RunPlan(
            storage=storage,
            listing=Listing(
                datasource.sources,
                datasource.input.sources,
                datasource.options.ids,
                datasource.options.files,
                datasource.options.shard,
                split_rows,
            ),
            policies=datasource.options.policies,
            output=self._target.output,
            table=self._target.table,
            publish_interval_s=publish_interval_s,
            signature=signature.text,
            alike=alike,
            code=signature.code,
            versions=signature.versions,
            max_errored_blocks=self._optimized.dataset.context.max_errored_blocks,
            read_schema=datasource.options.schema,
            having=datasource.having,
            stages=self._stages(),
            display=self._display(),
            announces=self._progress is not False,
        )

    def _stages(self) -> list[Stage]:
        return [
            stage_of(operator.fn, str(method_of(operator)), getattr(operator, "batch_size", None))
            for operator in arming.udf_operators(self._optimized)
        ]

    def _display(self) -> Display:
        context = self._optimized.dataset.context
        is_shown = self._progress
        if is_shown is None:
            is_shown = context.enable_progress_bars
        if not is_shown:
            return Display()
        return BarDisplay(Bar) if has_bars(context) else LogDisplay()

    def _execute_pass(self, this: Pass) -> None:
        self._has_begun = True
        datasink = self._target.datasink(this)
        retries = _RETRIES_ALONE if this.plan.isolated else _RETRIES
        armed = self._arm(this, retries)
        remote_args = dict(self._ray_remote_args)
        if self._optimized.ends_in_actors or self._most_writes is not None:
            # If actors and reads have taken all CPUs, Ray lets writes wait for one until the reads
            # are over. Nothing can be committed before.
            remote_args.setdefault("num_cpus", 0)
        with _ours_first():
            armed.write_datasink(
                datasink,
                ray_remote_args=remote_args,
                concurrency=self._concurrency or self._most_writes,
            )
        self._stats.append(armed.stats())

    def _arm(self, this: Pass, retries: int) -> Dataset:
        """Return a copy of the dataset that reads the sources of a pass and accounts for rows."""
        read = self._datasource
        if this.read_schema is not None:
            read = read.with_schema(this.read_schema)
        source = ArmedDatasource(read, this.sources, this.plan.sources, this.client)
        if this.known is not None:
            source = ArmedRows(read, this.sources, this.plan.sources, this.client, this.known)
        positions = itertools.count()
        armed = arming.arm(
            self._executed,
            source,
            self._read_tasks_of(this, source),
            lambda method, udf: instrument(udf, this.client, method, next(positions)),
            lambda expression: instrument_predicate(expression, this.client),
        )
        bound_retries(armed, retries)
        release_written_blocks(armed)
        pace(armed, min(_LONGEST_WAIT_IN_STEP_S, self._commit_interval_s))
        watch_pools(armed)
        guards.allow_write(armed)
        if armed.context.max_errored_blocks >= 0:
            armed.context.max_errored_blocks += this.plan.ignore_crashes
        return armed

    def _read_tasks_of(self, this: Pass, source: ArmedDatasource) -> int:
        """Return how many read tasks a pass has."""
        # The ranges of a file are one read.
        count = len(this.sources) if this.known is None else source.input.most_tasks(this.sources)
        if this.plan.isolated and count <= _MOST_ISOLATED:
            return count
        if self._read_tasks is not None:
            # More tasks than there are sources would split each task's output, which keeps Ray from
            # fusing the read with actors. A resume, with fewer sources, must not begin with that.
            is_split = self._read_tasks > len(self._datasource.sources)
            return self._read_tasks if is_split else min(self._read_tasks, count)
        return source.preferred_read_tasks(self._optimized.dataset.context)


@contextlib.contextmanager
def _ours_first() -> Iterator[None]:
    """Raise an error of ray_resume's own as it is, not below the frames of the task it ended."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, ResumeError):
            raise
        # Ray adds lines to it about retries, which there are none of.
        message = str(cause).partition("\nFailed to apply UDF transform")[0]
        raise type(cause)(message) from None
