"""The bakery: nobody's confirmed turns overlap, whoever is slow, stopped or killed."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
from world import World, WorldObjects

from ray_resume.checkpoint.objects import ObjectInfo
from ray_resume.checkpoint.shared.mutex import BakeryMutex, Turn, TurnExpiredError

pytestmark = pytest.mark.long

PATIENCE_S = 4.0


def history(
    seed: int,
    *,
    customers: int,
    turns: int,
    deaths: float,
    stops: float,
    bakery: type = BakeryMutex,
) -> list[tuple[float, float, str]]:
    """Return when confirmed turns began and ended, and whose they were."""
    world = World(seed, deaths=deaths, stops=stops, longest_s=3 * PATIENCE_S)
    objects = WorldObjects(world)
    confirmed: list[tuple[float, float, str]] = []

    def customer(who: str) -> None:
        for _ in range(turns):
            shop = bakery(
                objects, "queue", who, patience_s=PATIENCE_S, clock=world.clock, sleep=world.sleep
            )
            while True:
                try:
                    with shop.acquire() as turn:
                        began = world.now
                        for _ in range(world.random.randrange(4)):
                            world.step()
                        turn.confirm()
                        confirmed.append((began, world.now, who))
                        break
                except TurnExpiredError:
                    continue

    for number in range(customers):
        world.spawn(f"customer {number}", lambda who=f"{number:02x}": customer(who))  # type: ignore[misc]
    world.run()
    return sorted(confirmed)


def overlaps(turns: list[tuple[float, float, str]]) -> list[object]:
    return [
        (one, other)
        for one, other in itertools.pairwise(turns)
        if one[1] > other[0] and one[2] != other[2]
    ]


@pytest.mark.parametrize(
    ("deaths", "stops", "seeds"),
    [
        (0, 0, 30),
        (0.005, 0, 30),
        (0, 0.01, 30),
        (0.004, 0.01, 30),
        pytest.param(0.005, 0, 80, marks=pytest.mark.extended),
        pytest.param(0, 0.01, 150, marks=pytest.mark.extended),
        pytest.param(0.004, 0.01, 150, marks=pytest.mark.extended),
    ],
)
def test_confirmed_turns_do_not_overlap(deaths: float, stops: float, seeds: int) -> None:
    for seed in range(seeds):
        turns = history(seed, customers=2 + seed % 4, turns=2, deaths=deaths, stops=stops)
        assert not overlaps(turns), (seed, overlaps(turns))
        if not deaths:
            assert len(turns) == (2 + seed % 4) * 2


class Hasty(BakeryMutex):
    """Does not wait for those who are still choosing."""

    def _wait(self, ticket: str, looked_at: float) -> float | None:
        real = self._objects

        class Blind(WorldObjects):
            def list(self, folder: str, *, hidden: bool = False) -> dict[str, ObjectInfo]:
                return {k: v for k, v in real.list(folder).items() if "/a-" not in k}

        self._objects = Blind(real._world)  # type: ignore[attr-defined]
        try:
            return super()._wait(ticket, looked_at)
        finally:
            self._objects = real


@pytest.mark.extended
def test_who_does_not_wait_for_choosers_is_found_out() -> None:
    assert any(
        overlaps(history(seed, customers=4, turns=3, deaths=0, stops=0, bakery=Hasty))
        for seed in range(300)
    )


@pytest.mark.extended
def test_who_does_not_confirm_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Turn, "confirm", lambda _: None)
    assert any(
        overlaps(history(seed, customers=4, turns=3, deaths=0, stops=0.02)) for seed in range(100)
    )


def test_who_is_more_patient_than_another_keeps_his_place() -> None:
    """Each host may have a checkpoint with another `lease_ttl_s`."""
    for seed in range(20):
        turns = history_of(seed, {"0a": (8.0, 3.0), "0b": (2.0, 0.1)})
        assert len(turns) == 2
        assert not overlaps(turns), seed


def history_of(seed: int, customers: dict[str, tuple[float, float]]) -> list[Any]:
    """Have each customer, of some patience, stay inside for some seconds."""
    world = World(seed)
    objects = WorldObjects(world)
    confirmed: list[tuple[float, float, str]] = []

    def customer(who: str, patience_s: float, stay_s: float) -> None:
        clocks: Any = {"clock": world.clock, "sleep": world.sleep}
        shop = BakeryMutex(objects, "queue", who, patience_s=patience_s, **clocks)
        while who not in [other for _, _, other in confirmed]:
            with contextlib.suppress(TurnExpiredError), shop.acquire() as turn:
                began = world.now
                world.sleep(stay_s)
                turn.confirm()
                confirmed.append((began, world.now, who))

    for who, (patience_s, stay_s) in customers.items():
        world.spawn(who, lambda who=who, p=patience_s, s=stay_s: customer(who, p, s))  # type: ignore[misc]
    world.run()
    return sorted(confirmed)
