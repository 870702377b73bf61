"""The order of publications, on a real cluster."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import ray

from ray_resume.core.publications import Mark
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

        def publish(self, results: Sequence[bytes], rows: int, mark: Mark) -> None:
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
