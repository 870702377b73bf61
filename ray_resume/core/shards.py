"""Which share of the sources a run handles, and what a scheduler's environment says of it. Pure.

A source belongs to share ``digest(id) mod count``: whatever else is listed, in whatever order, in
every process. So the shares of one count are disjoint and together everything, and what remains to
be shown is that the tasks of an array get the ranks ``0 .. count - 1``, each once, and the same
rank again when they are requeued:

* *SLURM* says index, lowest, highest and number of tasks. If there are as many tasks as numbers
  from lowest to highest, the array is all of them, and the rank is ``index - lowest``. Otherwise it
  has gaps, and nothing in the environment tells which (``1,3,7`` and ``1,4,7`` look alike to task
  7; the step is a range's, and a list has none), so the rank is drawn: see below.
* *PBS* and *LSF* say the index alone, or with the highest. A guess from that would leave shares
  to nobody, silently, whenever some tasks of an array are submitted again; so their user says the
  count, and the rank is drawn.
* *torchrun* and its like say rank and count.

A rank is drawn from the checkpoint, which all tasks share: the first task of an array to ask gets
0, the next 1, and it is written down durably before it is used (`LocalBackend.rank_of`). A
requeued task has its array's id and its own index again, and so its rank. Shares are exact in
whatever order tasks start. If the note gets lost, shares overlap: then leases keep two tasks from
processing one source at once, and tasks skip the sources that are done.

Nothing that is committed depends on shares: another count, or none, is as good for the next run.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from ray_resume.core.digests import source_digest
from ray_resume.errors import ResumeError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ray_resume.core.digests import Digests

__all__ = ["ArrayTask", "Shard", "shard_of"]


@dataclass(frozen=True)
class Shard:
    """The share ``index`` of ``count``, ``0 <= index < count``."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"shard=({self.index}, {self.count}): the index must be at least 0 and less than "
                "the count"
            )

    @override
    def __str__(self) -> str:
        return f"shard {self.index} of {self.count}"

    def holds(self, source_id: str) -> bool:
        """Say whether the source is in this share."""
        return int.from_bytes(source_digest(source_id), "big") % self.count == self.index

    def of(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """Say of each source, by its digest, whether it is in this share."""
        held: npt.NDArray[np.bool_] = digests.modulo(self.count) == self.index
        return held


@dataclass(frozen=True)
class ArrayTask:
    """A task that is one of ``count`` in ``array``, a name that no other array has.

    Its rank among them is to be drawn from the checkpoint, for ``index`` does not tell.
    """

    array: str
    index: int
    count: int


def shard_of(value: Any, environ: Mapping[str, str]) -> Shard | ArrayTask:
    """Say which share is meant by ``value``: what a user passes as ``shard=``.

    Args:
        value: ``(index, count)``; or the name of a scheduler; or ``(name, count)``.
        environ: the process's environment, which a scheduler's name refers to.

    Raises:
        ValueError, TypeError: the value is none of these.
        ResumeError: the environment lacks what is needed, or contradicts itself.
    """
    name, count = value, None
    if not isinstance(value, str):
        if not isinstance(value, Sequence) or len(value) != 2:
            raise TypeError(_meant(value))
        name, count = value
        count = _integer(count, value)
        if not isinstance(name, str):
            return Shard(_integer(name, value), count)
        if count < 1:
            raise ValueError(f"shard={value!r}: the count must be at least 1")
    if name not in _SCHEDULERS:
        raise ValueError(_meant(value))
    return _SCHEDULERS[name](_Environment(name, environ), count)


class _Environment:
    """The variables of a scheduler; errors name the variable that is missing."""

    def __init__(self, scheduler: str, environ: Mapping[str, str]) -> None:
        self._scheduler = scheduler
        self._environ = environ

    def number(self, *names: str, why: str) -> int:
        """Return the number in the first of ``names`` that is set."""
        text = self.text(*names, why=why)
        # As a scheduler spells them: int() would take " 1_0" too.
        if not (text.isascii() and text.isdigit()):
            raise ResumeError(
                f'shard="{self._scheduler}" needs {why} from the environment, but '
                f"{' or '.join(names)} is {text!r}. {_WAY_OUT}"
            )
        return int(text)

    def text(self, *names: str, why: str) -> str:
        for name in names:
            if self._environ.get(name):
                return self._environ[name]
        others = [
            f"{marker} is set: is it shard={usage}?"
            for other, (marker, usage) in _MARKERS.items()
            if other != self._scheduler and self._environ.get(marker)
        ]
        raise ResumeError(
            f'shard="{self._scheduler}" needs {why} from the environment, but '
            f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not set (what is looked "
            f"for: {', '.join(_VARIABLES[self._scheduler])}). Is this a task of an array? "
            f"{' '.join([*others, _WAY_OUT])}"
        )


def _slurm(environment: _Environment, count: int | None) -> Shard | ArrayTask:
    index = environment.number("SLURM_ARRAY_TASK_ID", why="the task's index")
    tasks = environment.number("SLURM_ARRAY_TASK_COUNT", why="the number of tasks")
    low = environment.number("SLURM_ARRAY_TASK_MIN", why="the array's lowest index")
    high = environment.number("SLURM_ARRAY_TASK_MAX", why="the array's highest index")
    if not low <= index <= high or not 1 <= tasks <= high - low + 1:
        raise ResumeError(
            f"The environment contradicts itself: SLURM_ARRAY_TASK_ID is {index}, of "
            f"SLURM_ARRAY_TASK_COUNT={tasks} tasks from SLURM_ARRAY_TASK_MIN={low} to "
            f"SLURM_ARRAY_TASK_MAX={high}. {_WAY_OUT}"
        )
    _refuse_another_count("slurm", count, "SLURM_ARRAY_TASK_COUNT", tasks)
    if tasks == high - low + 1:
        return Shard(index - low, tasks)
    job = environment.text("SLURM_ARRAY_JOB_ID", why="the array's id")
    return ArrayTask(f"slurm {job}, {tasks} tasks from {low} to {high}", index, tasks)


def _pbs(environment: _Environment, count: int | None) -> Shard | ArrayTask:
    # PBS Professional and OpenPBS; Torque.
    index = environment.number("PBS_ARRAY_INDEX", "PBS_ARRAYID", why="the task's index")
    if count is None:
        raise _count_unknown("pbs", "PBS does not say how many tasks an array has")
    # 1234[7].server, for task 7 of array 1234[].server; 1234-7.server in old versions of Torque.
    job = environment.text("PBS_JOBID", why="the array's id")
    for own in (f"[{index}]", f"-{index}."):
        job = job.replace(own, own.replace(str(index), ""), 1)
    return ArrayTask(f"pbs {job}, {count} tasks", index, count)


def _lsf(environment: _Environment, count: int | None) -> Shard | ArrayTask:
    index = environment.number("LSB_JOBINDEX", why="the task's index")
    if index == 0:
        raise ResumeError(
            f"LSB_JOBINDEX is 0: this job is not a task of an array, as bsub -J 'name[1-8]' makes "
            f"one. {_WAY_OUT}"
        )
    if count is None:
        raise _count_unknown(
            "lsf", "LSF says an array's last index, but not its first one, nor its gaps"
        )
    job = environment.text("LSB_JOBID", why="the array's id")
    return ArrayTask(f"lsf {job}, {count} tasks", index, count)


def _torchrun(environment: _Environment, count: int | None) -> Shard | ArrayTask:
    rank = environment.number("RANK", why="the process's rank")
    size = environment.number("WORLD_SIZE", why="the number of processes")
    if rank >= size:
        raise ResumeError(
            f"The environment contradicts itself: RANK is {rank}, and WORLD_SIZE is {size}. "
            f"{_WAY_OUT}"
        )
    _refuse_another_count("torchrun", count, "WORLD_SIZE", size)
    return Shard(rank, size)


def _refuse_another_count(name: str, count: int | None, variable: str, actual: int) -> None:
    if count not in (None, actual):
        raise ResumeError(
            f'shard=("{name}", {count}): but {variable} is {actual}, so some shares would be '
            f'nobody\'s, or some tasks without one. Pass shard="{name}".'
        )


def _count_unknown(name: str, why: str) -> ResumeError:
    return ResumeError(
        f'shard="{name}": {why}, and a wrong guess would leave sources to nobody. Say how many '
        f'tasks are in the array: shard=("{name}", 8). Its indexes may start anywhere and have '
        "gaps."
    )


def _integer(number: Any, value: Any) -> int:
    try:
        return operator.index(number)
    except TypeError:
        raise TypeError(_meant(value)) from None


def _meant(value: Any) -> str:
    names = ", ".join(f'"{name}"' for name in _SCHEDULERS)
    return (
        f"shard must be (index, count), the name of a scheduler ({names}) or (name, count), not "
        f"{value!r}"
    )


_SCHEDULERS = {"slurm": _slurm, "pbs": _pbs, "lsf": _lsf, "torchrun": _torchrun}

_VARIABLES = {
    "slurm": (
        "SLURM_ARRAY_TASK_ID",
        "SLURM_ARRAY_TASK_COUNT",
        "SLURM_ARRAY_TASK_MIN",
        "SLURM_ARRAY_TASK_MAX",
        "SLURM_ARRAY_JOB_ID",
    ),
    "pbs": ("PBS_ARRAY_INDEX or PBS_ARRAYID", "PBS_JOBID"),
    "lsf": ("LSB_JOBINDEX", "LSB_JOBID"),
    "torchrun": ("RANK", "WORLD_SIZE"),
}

# A variable that shows that another scheduler is at work, and how its users ask for their share.

_MARKERS = {
    "slurm": ("SLURM_ARRAY_TASK_ID", '"slurm"'),
    "pbs": ("PBS_ARRAY_INDEX", '("pbs", count)'),
    "lsf": ("LSB_JOBINDEX", '("lsf", count)'),
    "torchrun": ("WORLD_SIZE", '"torchrun"'),
}

_WAY_OUT = "To give the share yourself: shard=(index, count)."
