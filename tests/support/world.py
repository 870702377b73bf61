"""Processes that share a storage, one step at a time, in any order, with deaths and stops.

A :class:`World` runs ordinary code in threads of which only one goes on at a time: each operation
on the storage is two places to wait at, one before it takes effect and one after it. What goes on
next, who is killed, and who is stopped for how long, is drawn from a seed, so that each history
can be had again. Clocks are the world's, and those of different processes do not agree.
"""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ray_resume.checkpoint.objects import ObjectInfo
from ray_resume.errors import CheckpointError


class Killed(BaseException):
    """Raised in whoever was killed, at each of its steps: what it still tries has no effect."""


class StuckError(AssertionError):
    """Nothing comes to an end."""


@dataclass(eq=False)
class Process:
    """One thread of the world; a heart is a second one, and dies and stops with its process.

    Processes of one ``host`` die and stop each by itself, or stop all together.
    """

    world: World
    name: str
    work: Callable[[], None]
    offset_s: float
    body: Process | None = None
    host: Process | None = None
    wake_at: float = 0.0
    stopped_until: float = 0.0
    dead: bool = False
    over: bool = False
    error: BaseException | None = None
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.is_dead():
                self.work()
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        self.over = True
        self.world.idle.release()

    def is_dead(self) -> bool:
        return self.dead or (self.body is not None and self.body.dead)

    def home(self) -> Process:
        body = self.body or self
        return body.host or body

    def ready_at(self) -> float:
        stopped = self.stopped_until if self.body is None else self.body.stopped_until
        return max(self.wake_at, stopped)


class World:
    """Run with :meth:`run`; the rest is for the code that runs in it."""

    def __init__(self, seed: int, *, deaths: float = 0.0, stops: float = 0.0, longest_s: float = 1):
        self.random = random.Random(seed)
        self.now = 0.0
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.idle = threading.Semaphore(0)
        self.log: list[str] = []
        self._deaths, self._stops, self._longest_s = deaths, stops, longest_s
        self._processes: list[Process] = []
        self._current: Process | None = None

    def spawn(
        self,
        name: str,
        work: Callable[[], None],
        *,
        body: Process | None = None,
        host: Process | None = None,
        after_s: float = 0.0,
    ) -> Process:
        offset_s = self.random.uniform(0, 1e6) if body is None else body.offset_s
        process = Process(self, name, work, offset_s, body, host, wake_at=self.now + after_s)
        self._processes.append(process)
        threading.Thread(target=process.run, daemon=True).start()
        return process

    def run(self, *, until: Callable[[], bool] = lambda: False, steps: int = 200_000) -> None:
        """Run until everybody is over, or ``until``; raise the first error of any of them."""
        for _ in range(steps):
            living = [p for p in self._processes if not p.over]
            if not living or until():
                break
            soonest = min(p.ready_at() for p in living)
            self.now = max(self.now, soonest)
            self._go_on(self.random.choice([p for p in living if p.ready_at() <= self.now]))
        else:
            raise StuckError(self.log[-20:])
        for process in self._processes:
            if process.error is not None:
                raise process.error

    def _go_on(self, process: Process) -> None:
        self._current = process
        process.turn.release()
        self.idle.acquire()

    def current(self) -> Process:
        assert self._current is not None
        return self._current

    def clock(self) -> float:
        return self.now + self.current().offset_s

    def sleep(self, seconds: float) -> None:
        self.step(seconds)

    def step(self, seconds: float = 0.0) -> None:
        """Let others go on; be killed or stopped here, perhaps."""
        process = self.current()
        if process.is_dead():
            raise Killed
        body = process.body or process
        if self.random.random() < self._deaths:
            self.log.append(f"{self.now:.2f} {body.name} is killed")
            body.dead = True
            raise Killed
        if self.random.random() < self._stops:
            duration_s = self.random.uniform(0, self._longest_s)
            self.stop(body, duration_s, whole_host=self.random.random() < 0.5)
        # Networks have moments.
        delay_s = self.random.uniform(0.001, 0.05 if self.random.random() < 0.95 else 1.0)
        process.wake_at = self.now + seconds + delay_s
        self.idle.release()
        process.turn.acquire()
        self._current = process
        if process.is_dead():
            raise Killed

    def stop(self, body: Process, duration_s: float, *, whole_host: bool) -> None:
        host = f"the host of {body.name}" if whole_host else body.name
        self.log.append(f"{self.now:.2f} {host} stops for {duration_s:.2f} s")
        for process in self._processes if whole_host else [body]:
            if process is body or process.home() is body.home():
                process.stopped_until = self.now + duration_s

    def say(self, text: str) -> None:
        self.log.append(f"{self.now:.2f} {self.current().name} {text}")


class WorldLock:
    """A lock that is waited for in the world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._holder: Process | None = None

    def __enter__(self) -> None:
        while self._holder is not None and not self._holder.is_dead():
            self._world.sleep(0.01)
        self._holder = self._world.current()

    def __exit__(self, *_: object) -> None:
        self._holder = None


class WorldObjects:
    """`objects.Objects` in a world's memory. A listing is no snapshot, and knows whole seconds.

    Args:
        errors: how many of a thousand operations fail for good, before or after they take effect.
            What was put may also land long after that, or after the death of whoever put it.
        latest_s: how much later it may land.
    """

    uri = path = "world"

    def __init__(self, world: World, *, errors: float = 0.0, latest_s: float = 0.0) -> None:
        self._world = world
        self._errors = errors
        self._latest_s = latest_s
        # For how long the host that puts an object of this name is stopped before it is there.
        self.stops: dict[str, float] = {}

    def put(self, name: str, data: bytes) -> None:
        if (duration_s := self.stops.pop(name, 0.0)) > 0:
            process = self._world.current()
            self._world.stop(process.body or process, duration_s, whole_host=True)
        try:
            self._world.step()
            self._fail(name)
        except (Killed, CheckpointError):
            if self._latest_s and self._world.random.random() < 0.3:
                self._land_later(name, data)
            raise
        self._world.objects[name] = data, self._world.now
        self._world.step()
        self._fail(name)

    replace = put

    def get(self, name: str) -> bytes | None:
        self._world.step()
        self._fail(name)
        data = self._world.objects.get(name, (None, 0.0))[0]
        self._world.step()
        return data

    def get_all(self, names: Sequence[str]) -> Iterator[bytes | None]:
        return map(self.get, names)

    def list(self, folder: str, *, hidden: bool = False) -> Mapping[str, ObjectInfo]:
        self._world.step()
        self._fail(folder)
        # Half of the names at one time, the others at another: those of each half by no rule.
        salt = self._world.random.randrange(1 << 30)
        listing: dict[str, ObjectInfo] = {}
        for half in (0, 1):
            for name, (data, at) in self._world.objects.items():
                if name.startswith(f"{folder}/") and zlib.crc32(name.encode(), salt) % 2 == half:
                    listing[name] = ObjectInfo(len(data), int(at) * 10**9)
            self._world.step()
        return listing

    def delete(self, names: Iterable[str]) -> None:
        for name in list(names):
            self._world.step()
            self._fail(name)
            self._world.objects.pop(name, None)
        self._world.step()

    def _fail(self, name: str) -> None:
        if self._world.random.random() * 1000 < self._errors:
            self._world.say(f"gets no answer about {name}")
            raise CheckpointError(f"no answer about {name}")

    def _land_later(self, name: str, data: bytes) -> None:
        delay_s = self._world.random.uniform(0, self._latest_s)

        def land() -> None:
            self._world.objects[name] = data, self._world.now
            self._world.log.append(f"{self._world.now:.2f} {name} lands")

        self._world.spawn(f"network with {name}", land, after_s=delay_s)
