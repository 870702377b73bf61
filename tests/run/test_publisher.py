"""The order of publications, on a real cluster."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import ray

from ray_resume.core.messages import Completion
from ray_resume.core.publications import Mark, PublicationQueue
from ray_resume.errors import ResumeError
from ray_resume.run.publisher import Publisher

pytestmark = pytest.mark.extended


class Held:
    """A lease that is held."""

    def check(self) -> None:
        pass

    def is_last_holder(self, *, wait_s: float) -> bool:
        return True

    def end(self, *, wait_s: float) -> None:
        pass

    def release(self) -> None:
        pass


class Steps:
    """An actor that writes down what it was asked."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def take_unpublished(self, position: str | None) -> tuple[int, list[bytes], int, bool]:
        assert position == "here"
        self.steps.append("take")
        return len(self.steps), [b"result"], 1, False

    def confirm_published(self, number: int) -> None:
        assert number == len(self.steps)
        self.steps.append("confirm")

    def all(self) -> list[str]:
        return self.steps


@pytest.mark.usefixtures("cluster")
def test_a_second_interrupt_does_not_mix_two_publications() -> None:
    """It ends the wait for the thread. What the thread confirms must be what it has published."""
    remote: Any = ray.remote(Steps)
    handle = remote.options(num_cpus=0).remote()
    begun, go_on = threading.Event(), threading.Event()

    class SlowTable:
        has_marks = True

        def position(self) -> str | None:
            return "here"

        def holds(self, mark: Mark, position: str | None) -> bool:
            return False

        def settle(self, mark: Mark, position: str | None) -> bool:
            raise AssertionError

        def publish(
            self, results: Sequence[bytes], rows: int, mark: Mark, check: Callable[[], None]
        ) -> None:
            begun.set()
            go_on.wait(30)

    publisher = Publisher(handle, Held(), SlowTable(), Mark("c", "r", 0), 0.01)
    ended = contextlib.ExitStack()
    ended.enter_context(publisher.regularly())
    assert begun.wait(30)
    # As the driver does it after it was interrupted while it waited.
    second = threading.Thread(target=publisher.publish_now)
    second.start()
    second.join(1)
    assert ray.get(handle.all.remote()) == ["take"]
    go_on.set()
    second.join(30)
    ended.close()
    steps = ray.get(handle.all.remote())
    assert len(steps) >= 4
    assert steps == ["take", "confirm"] * (len(steps) // 2)


class Queue:
    """An actor with one source to publish."""

    def __init__(self) -> None:
        self._queue = PublicationQueue()
        self._queue.add([Completion(0, 1, 1, (), (b"result",))])

    def take_unpublished(self, position: str | None) -> tuple[int, list[bytes], int, bool] | None:
        taken = self._queue.take()
        return None if taken is None else (taken.number, taken.results, taken.rows, taken.again)

    def confirm_published(self, number: int) -> None:
        self._queue.confirm(number)


class Interrupted:
    """A table; the user interrupts its first publication before or after that."""

    def __init__(self, *, before: bool, has_marks: bool = True) -> None:
        self.has_marks = has_marks
        self.marks: list[Mark] = []
        self._before, self._moves = before, 0

    def position(self) -> str | None:
        self._moves += 1
        return str(self._moves)

    def holds(self, mark: Mark, position: str | None) -> bool:
        assert position == "1", "as it stood before the first try"
        return mark in self.marks

    def settle(self, mark: Mark, position: str | None) -> bool:
        raise AssertionError

    def publish(
        self, results: Sequence[bytes], rows: int, mark: Mark, check: Callable[[], None]
    ) -> None:
        first, self._moves = self._moves == 1, self._moves + 1
        if not (first and self._before):
            self.marks.append(mark)
        if first:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("has_marks", [True, False])
def test_an_interrupted_publication_is_not_made_twice(before: bool, has_marks: bool) -> None:
    remote: Any = ray.remote(Queue)
    handle = remote.options(num_cpus=0).remote()
    table = Interrupted(before=before, has_marks=has_marks)
    publisher = Publisher(handle, Held(), table, Mark("c", "r", 0), 60)
    with pytest.raises(KeyboardInterrupt):
        publisher.publish_now()
    if has_marks:
        publisher.publish_now()
        publisher.publish_now()
        assert table.marks == [Mark("c", "r", 1)]
        return
    with pytest.raises(ResumeError, match="cannot tell whether it happened"):
        publisher.publish_now()
    assert len(table.marks) == (not before)
