"""A shared checkpoint from the start: its identity, its sink, the ranks of its tasks."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from buckets import S3
from shared_checkpoint import Unanswered, claim, objects_of, opened, place_of, run

from ray_resume import Checkpoint, CheckpointError
from ray_resume.checkpoint.claims import Owner
from ray_resume.checkpoint.identity import FORMAT_VERSION
from ray_resume.checkpoint.location import Location
from ray_resume.checkpoint.shared.backend import SharedBackend
from ray_resume.core.shards import ArrayTask

pytestmark = [pytest.mark.extended, pytest.mark.long]


def test_it_is_made_once_and_bound_to_one_sink(place: Location) -> None:
    storage = opened(place)
    assert place.open().identity() == storage.ensure() == storage.identity()
    assert storage.sink() is None
    storage.bind("/out", run(1))
    assert place.open().sink() == "/out"
    lease = storage.acquire(Owner.here(run(2)), claim("a"), wait_s=0)
    with pytest.raises(CheckpointError, match=r"being used for /out by another"):
        storage.bind("/elsewhere", run(3))
    storage.bind("/elsewhere", run(2))
    lease.end(wait_s=0)
    assert place.open().sink() == "/elsewhere"


def test_it_stays_bound_when_it_is_made_again_much_later(tmp_path: Path) -> None:
    """Who was stopped while he made it goes on when others have long been at work."""
    place = Location(str(tmp_path), shared=True)
    late = place.open()
    slow = late._kept = Unanswered(late._kept, "checkpoint.json")
    with pytest.raises(CheckpointError, match="cannot write"):
        late.ensure()
    opened(place).bind("/out", run(1))
    slow.land()
    assert place.open().sink() == "/out"


def test_what_is_not_there_is_told(place: Location) -> None:
    for call in (place.open().identity, Checkpoint(place_of(place)).status):
        with pytest.raises(CheckpointError, match="There is no checkpoint at"):
            call()


def test_a_shared_folder_is_known_again(tmp_path: Path) -> None:
    Location(str(tmp_path), shared=True).open().ensure()
    assert isinstance(Location(str(tmp_path)).open(), SharedBackend)


def test_eight_tasks_draw_eight_ranks_at_once(place: Location) -> None:
    opened(place)
    ranks: dict[int, int] = {}

    def draw(index: int) -> None:
        ranks[index] = place.open().rank_of(ArrayTask("array", index, 8))

    threads = [threading.Thread(target=draw, args=(7 * index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ranks.values()) == list(range(8))
    assert all(place.open().rank_of(ArrayTask("array", i, 8)) == rank for i, rank in ranks.items())
    with pytest.raises(CheckpointError, match="task 3 is one more"):
        place.open().rank_of(ArrayTask("array", 3, 8))
    assert not objects_of(opened(place)).list("queue")


def test_a_local_checkpoint_is_not_taken_for_a_shared_one(place: Location) -> None:
    storage = opened(place)
    identity = {"id": "0" * 8, "layout": None, "format": FORMAT_VERSION}
    objects_of(storage).replace("checkpoint.json", json.dumps(identity).encode())
    with pytest.raises(CheckpointError, match="directory of one host's own"):
        place.open().identity()


@pytest.mark.slow
def test_an_unreachable_storage_is_one_clear_error(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_resume.checkpoint.shared import objects

    monkeypatch.setattr(objects, "_RETRY_DELAYS_S", (0.01,))
    uri = s3.uri("x").replace(str(s3.port), "1")
    with pytest.raises(CheckpointError, match=r"s3://bucket-\w+/x.* fails: cannot list "):
        Checkpoint(uri).status()
    with pytest.raises(CheckpointError, match=r"fails: cannot write"):
        Location(replace(s3, bucket="no-such-bucket").uri("x")).open().ensure()
