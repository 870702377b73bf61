"""A datasource of the user's as an input: each of its read tasks is a source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray.data.datasource import Datasource, ReadTask
from typing_extensions import override

from ray_resume.core.sources import Source, SourceTable, refuse_repeated
from ray_resume.errors import NonResumableError, SourceChangedError
from ray_resume.raydata.filereads import ReadTaskFactory, Selection
from ray_resume.read.inputs import Input, unknown_metadata

__all__ = ["DatasourceInput", "MadeTasks"]


@dataclass(frozen=True)
class DatasourceInput(Input):
    """The read tasks of a datasource of the user's own.

    A source's item is what its task named as its files. A datasource may list when it is asked for
    tasks, so each execution asks again, and finds each source's task by its id, wherever it is.

    Two executions of a task may give other rows, so the input counts as not repeatable.
    """

    name: str
    sources: SourceTable
    datasource: Datasource
    task_count: int
    source_id: Callable[[ReadTask, int], str] | None = None

    @property
    @override
    def distributed(self) -> bool:
        return bool(self.datasource.supports_distributed_reads)

    @classmethod
    def of(
        cls,
        datasource: Datasource,
        source_id: Callable[[ReadTask, int], str] | None,
        task_count: int,
    ) -> DatasourceInput:
        """Identify the read tasks of ``datasource``.

        Args:
            source_id: gives each task its identity; without it, a task is the one file it reads.
            task_count: how many tasks to ask the datasource for, in every run.

        Raises:
            NonResumableError: the tasks have no stable identity.
        """
        tasks = datasource.get_read_tasks(task_count)
        if source_id is None:
            # One task for each file, where the datasource can be asked for that many.
            task_count = max(task_count, sum(len(_files_of(task)) for task in tasks))
            tasks = datasource.get_read_tasks(task_count)
            if not all(len(_files_of(task)) == 1 for task in tasks):
                raise NonResumableError(
                    f"The read tasks of {datasource.get_name()} have no identity that is the same "
                    "in every run: they do not name one file each. Pass source_id=, a function of "
                    "a read task and its position that returns one (what it reads, not where it "
                    "stands), or read by keys=."
                )
        sources = SourceTable.of(
            Source(str(_task_id(task, index, source_id)), _files_of(task))
            for index, task in enumerate(tasks)
        )
        refuse_repeated(sources)
        return cls(datasource.get_name(), sources, datasource, task_count, source_id)

    @override
    def open(
        self, sources: SourceTable, selection: Selection, data_context: Any
    ) -> tuple[Callable[[range], ReadTaskFactory], Selection]:
        tasks = self.datasource.get_read_tasks(self.task_count, None, data_context)
        found = self._bind(sources, tasks)
        # Selected after reading: a datasource that selects may cut its tasks otherwise.
        return lambda positions: MadeTasks(found[positions.start : positions.stop]), selection

    def _bind(self, sources: SourceTable, tasks: Sequence[ReadTask]) -> list[ReadTask]:
        """Return the task of each of ``sources``; one that raises for a source without a task.

        Raises:
            NonResumableError: two tasks have the same id.
        """
        named: dict[str | None, ReadTask] = {}
        for index, task in enumerate(tasks):
            name = _task_id(task, index, self.source_id)
            if name is not None and name in named:
                raise NonResumableError(
                    f"{self.name} gave two read tasks for {name}, so they cannot be told apart."
                )
            named[name] = task
        found = []
        for source in sources:
            mine = named.get(source.source_id)
            if mine is None or _files_of(mine) != source.item:
                then = None if mine is None else _files_of(mine)
                read = _MissingRead(self.name, source.source_id, source.item, then)
                mine = ReadTask(read, unknown_metadata())
            found.append(mine)
        return found


def _files_of(task: ReadTask) -> tuple[str, ...]:
    return tuple(map(str, task.metadata.input_files or ()))


def _task_id(
    task: ReadTask, index: int, source_id: Callable[[ReadTask, int], str] | None
) -> str | None:
    """Return the id of a read task; None if it has none: then it is of no source."""
    if source_id is not None:
        return str(source_id(task, index))
    files = _files_of(task)
    return files[0] if len(files) == 1 else None


@dataclass(frozen=True)
class _MissingRead:
    """Replaces a read task that the datasource no longer gives."""

    name: str
    source_id: str
    listed: tuple[str, ...]
    then: tuple[str, ...] | None

    def __call__(self) -> Iterator[Any]:
        what = "gives no read task for it any more"
        if self.then is not None:
            what = f"gives it another read task now: it reads {self.then}, not {self.listed}"
        raise SourceChangedError(
            f"{self.source_id} was listed, and {self.name} {what}. Read again to list what there "
            "is now."
        )


@dataclass(frozen=True)
class MadeTasks:
    """Read tasks that only the driver could make."""

    tasks: Sequence[ReadTask]

    def __call__(self, sources: SourceTable) -> Sequence[ReadTask]:
        return self.tasks
