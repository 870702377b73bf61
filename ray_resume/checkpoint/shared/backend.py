"""A checkpoint in a storage that hosts share: an object store, or a network file system.

::

    checkpoint.json               identity, format version: the same, however late it lands
    sink.json                     the sink that it is bound to
    arrays/<array>/<rank>-<task>  which rank each task of an array has drawn (see `core.shards`)
    queue/...                     who wants to take or look at leases (see `mutex`)
    leases/<run>.json, .claim     while that run may be alive: who it is, which sources are its own
    leases/<run>.driver, .ledger  signs of life of its two processes (see `heartbeat`)
    runs/<run>/<number>.part, .whole    what that run has published (see `segments`)
    runs/<run>/fence-<by>-<number>      up to where that counts, once others call the run dead
    schemas/<run>.json            which types the output has (see `output_schemas`)
    dead-letters/...              (see `dead_letters`)

Nothing here locks: there may be no lock that spans hosts. What keeps rows safe instead:

* A run takes its lease in its turn (`mutex`), when no live run has a source in common with it.
* A run whose signs of life have stopped for ``ttl_s`` is dead. Its successor puts up a *fence*
  before it relies on what the run has left, so what the dead run may still publish counts for
  nobody. Only then its lease is removed.
* What is committed was published *before* the run made sure that nobody could have called it dead:
  so each successor has seen it. If it cannot make sure, it commits nothing more, and says so.
* LMDB stays on the driver's own disk, in a scratch directory. What is published is what is in
  there. The same directory has a lock that only processes of that host can hold: it proves to a
  successor on the same host that a run is dead, without waiting.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ray_resume.checkpoint.claims import Claim, Owner, refusal
from ray_resume.checkpoint.contents import MERGED, Contents, Look, Note, contents_of, merged_headers
from ray_resume.checkpoint.dead_letters import LetterObjects
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.local.reader import Reading
from ray_resume.checkpoint.mounts import network_filesystem_type
from ray_resume.checkpoint.output_schemas import SchemaStore
from ray_resume.checkpoint.shared.heartbeat import Heartbeat, HeartbeatMonitor
from ray_resume.checkpoint.shared.leases import SharedLease, fence_own
from ray_resume.checkpoint.shared.mutex import BakeryMutex, Turn, TurnExpiredError, boottime_s
from ray_resume.checkpoint.shared.objects import ObjectInfo, Objects, StoredObjects
from ray_resume.checkpoint.shared.segments import (
    counted_segments,
    fence_name,
    last_number,
    whole_name,
)
from ray_resume.checkpoint.shared.segments import decode as decode_segment
from ray_resume.checkpoint.shared.segments import encode as encode_segment
from ray_resume.checkpoint.shared.writer import SharedLedgerBinding
from ray_resume.core.digests import source_digest
from ray_resume.core.records import columns_of
from ray_resume.core.shards import ArrayTask, Shard
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint

__all__ = ["IDENTITY", "LAYOUT", "SharedBackend"]

T = TypeVar("T")

IDENTITY = "checkpoint.json"
LAYOUT = "shared"
"""What the identity of such a checkpoint says of it."""

_SINK = "sink.json"
_FORMAT_VERSION = 1
_LOOKS = 10
_POLLS_PER_TTL = 15

_RUN = re.compile(r"[0-9a-f]{12}")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SharedBackend:
    """A checkpoint in ``objects``. Creating the object touches nothing.

    Args:
        ttl_s: how long a run's silence lasts until others call it dead, in seconds.
        publish_interval_s: how long what is complete waits to be published.
        scratch: a directory of this host's own; one in the host's directory for temporary files
            by default.
    """

    def __init__(
        self,
        objects: StoredObjects | Objects,
        *,
        ttl_s: float,
        publish_interval_s: float,
        uri: str | None = None,
        scratch: Path | None = None,
        clock: Callable[[], float] = boottime_s,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._objects = objects
        self._ttl_s = ttl_s
        self._publish_interval_s = publish_interval_s
        self._uri = uri if uri is not None else getattr(objects, "uri", "")
        self._scratch = scratch
        self._clock = clock
        self._sleep = sleep
        self._watch = HeartbeatMonitor()
        # The heart's thread looks as well, so that at a run's end it is known who was silent.
        self._looking = threading.Lock()
        self._leases: dict[str, _LeaseFile] = {}
        self._claims: dict[str, Claim] = {}
        self._declared_dead: set[str] = set()

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def root(self) -> str:
        return str(getattr(self._objects, "path", self._uri))

    @property
    def max_death_detection_s(self) -> float:
        return self._ttl_s * 1.25

    def ensure(self) -> str:
        if self._objects.get(IDENTITY) is None:
            # The same for everybody who makes it at once, but checkpoints elsewhere have others.
            identity = hashlib.blake2b(self.root.encode(), digest_size=4).hexdigest()

            def make(_: Turn) -> None:
                if self._objects.get(IDENTITY) is None:
                    text = json.dumps({"id": identity, "layout": LAYOUT, "format": _FORMAT_VERSION})
                    failpoint("checkpoint.writing")
                    self._objects.replace(IDENTITY, text.encode())

            self._in_turn(os.urandom(6).hex(), make)
        return self.identity()

    def identity(self) -> str:
        return str(self._read_identity()["id"])

    def sink(self) -> str | None:
        data = self._objects.get(_SINK)
        if data is None:
            return None
        try:
            return str(json.loads(data)["sink"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._unreadable(f"{self.uri}/{_SINK}", error) from error

    def bind(self, sink: str, own: str) -> None:
        if self.sink() == sink:
            return

        def bind(_: Turn) -> None:
            bound = self.sink()
            if bound not in (None, sink) and self._living()[0].keys() - {own}:
                raise CheckpointError(
                    f"The checkpoint {self.uri} is being used for {bound} by another "
                    f"run, and this one would write to {sink}. Give it a checkpoint of its own."
                )
            failpoint("checkpoint.writing")
            self._objects.replace(_SINK, json.dumps({"sink": sink}).encode())

        self._in_turn(own, bind)

    def rank_of(self, task: ArrayTask) -> int:
        """Return the rank of ``task`` among those of its array, drawn when it first asks.

        Guarantees: tasks with different indexes get different ranks, from 0 to ``count - 1``; one
        with the same index gets the same rank again.
        """
        folder = f"arrays/{source_digest(task.array).hex()}"
        drawn_now: list[str] = []

        def draw(_: Turn) -> int:
            ranks = self._ranks(folder)
            if task.index in ranks:
                return ranks[task.index]
            if len(ranks) >= task.count:
                raise CheckpointError(
                    f"The array ({task.array}) has drawn all its ranks, for the tasks "
                    f"{', '.join(map(str, sorted(ranks)))}, and task {task.index} is one more. Is "
                    "the count right? If the array is another one with the same id, pass "
                    "shard=(index, count) instead."
                )
            rank = min(set(range(task.count)) - set(ranks.values()))
            drawn_now[:] = [f"{folder}/{rank:06d}-{task.index}"]
            self._objects.put(drawn_now[0], b"")
            return rank

        return self._in_turn(
            os.urandom(6).hex(), draw, undo=lambda: self._objects.delete(drawn_now)
        )

    def acquire(self, owner: Owner, claim: Claim, *, wait_s: float) -> SharedLease:
        """Take the lease of run ``owner.run_id`` as soon as no live run shares a source with it.

        Raises:
            CheckpointError: after ``wait_s`` seconds one still does; the message names its owner.
        """
        deadline = self._clock() + wait_s
        run_id = owner.run_id
        scratch = self._scratch_directory()
        name = f"leases/{run_id}"
        lock = Lease.hold(scratch, owner)
        taken = {
            **asdict(owner),
            "ttl_s": self._ttl_s,
            "share": claim.shard,
            "boot": _boot(),
            "lock": str(lock.path),
        }
        heart: Heartbeat | None = None
        try:
            self._objects.put(f"{name}.claim", claim.to_bytes())
            while True:
                # Without queueing first: most who wait here wait for somebody.
                rival = self._rival(claim, run_id)
                if rival is None:

                    def take(_: Turn) -> tuple[Owner | None, Heartbeat | None]:
                        rival = self._rival(claim, run_id)
                        if rival is not None:
                            return rival, None
                        # Observers must find a sign of life beside the lease from the start.
                        heart = self._heart(f"{name}.driver")
                        self._objects.put(f"{name}.json", json.dumps(taken).encode())
                        return None, heart

                    rival, heart = self._in_turn(
                        run_id, take, undo=lambda: self._objects.delete([f"{name}.json"])
                    )
                    if heart is not None:
                        break
                if rival is not None and self._clock() >= deadline:
                    raise refusal(self.uri, owner, rival, wait_s)
                self._sleep(self._ttl_s / _POLLS_PER_TTL)
            self._tidy_scratch(scratch)
            heart.start()
            return SharedLease(self._objects, run_id, heart, lock)
        except BaseException:
            with contextlib.suppress(CheckpointError):
                self._objects.delete([f"{name}.json", f"{name}.claim", f"{name}.driver"])
            with contextlib.suppress(CheckpointError):
                if heart is not None:
                    heart.end()
            lock.end(wait_s=0)
            raise

    def bind_ledger(self, run_id: str, lease: SharedLease) -> SharedLedgerBinding:
        return SharedLedgerBinding(
            self._objects, run_id, str(lease.lock.path), self._ttl_s, self._publish_interval_s
        )

    def committed_by_dead_runs(self, own: str) -> Contents:
        """Read what all dead runs committed, and run ``own``, whose ledger is closed or not open.

        Dead runs that nobody has told dead before are fenced first, and lose their lease. So is
        run ``own``, if it has published: its ledger's last request may be under way although its
        process is gone, or has given up waiting for an answer.
        """
        self._fence_the_dead(own)
        fence_own(self._objects, own)
        # Who has a lease now may be at work, whoever he is. Who has published and has none is over
        # for good, and was fenced before it was taken from him: so its names are listed after that.
        known = self._runs().keys()
        live, dead = self._living()
        live = {run_id: owner for run_id, owner in {**live, **dead}.items() if run_id != own}
        runs = {
            run_id: names
            for run_id, names in self._runs().items()
            if run_id in known and run_id not in live
        }

        return contents_of(self._without_merged(self._read(runs)), live, {})

    def _fence_the_dead(self, own: str) -> None:
        _, dead = self._living()
        dead.pop(own, None)
        if not dead:
            return
        runs = self._runs()
        for run_id in dead:
            last = last_number(runs.get(run_id, ()))
            self._objects.put(f"runs/{run_id}/{fence_name(own, last)}", b"")
        failpoint("shared.fenced")
        for run_id in dead:
            self._objects.delete(
                f"leases/{run_id}.{kind}" for kind in ("json", "claim", "driver", "ledger")
            )

    def snapshot(self) -> Contents:
        self._read_identity()
        look = self.scan()
        return contents_of(look.readings, look.live, look.killed)

    def scan(self) -> Look:
        for attempt in range(_LOOKS):
            note = self.list_runs()
            readings = self._read(self._runs())
            # What a live run has just merged is elsewhere now.
            if all(reading.error is None for reading in readings) or attempt == _LOOKS - 1:
                break
            self._sleep(0.1)
        return Look(note.live, note.killed, note.files, self._without_merged(readings))

    def list_runs(self) -> Note:
        """Note who is about and which files there are.

        Who has been silent for long by the storage's clock and ours counts as killed: good to be
        told to people, and nothing is decided by it.
        """
        live, killed = self._living()
        # Another thread may look at the same time.
        leases = self._leases
        listing = self._objects.list("leases")
        for run_id in list(live):
            times = [
                stamp.mtime_ns
                for name, stamp in listing.items()
                if name.startswith(f"leases/{run_id}.") and stamp.mtime_ns is not None
            ]
            taken = leases.get(run_id)
            if times and taken and time.time() - max(times) / 1e9 > taken.ttl_s:
                killed[run_id] = live.pop(run_id)
        return Note(live, killed, dict(self.writers()))

    def writers(self) -> dict[str, Path | str]:
        return {
            run_id: f"{self.uri}/runs/{run_id}"
            for run_id, names in self._runs().items()
            if last_number(names)
        }

    def schemas(self) -> SchemaStore:
        return SchemaStore(self._objects, self.uri)

    def letters(self) -> LetterObjects:
        return LetterObjects(self._objects)

    def write_whole(
        self, run_id: str, header: Mapping[str, Any], blocks: Iterable[bytes]
    ) -> Reading:
        name = f"runs/{run_id}/{whole_name(1)}"
        self._objects.put(name, encode_segment({**header, "run_id": run_id}, blocks))
        (reading,) = self._read({run_id: [name.rpartition("/")[2]]})
        return reading

    def remove_writers(self, files: Mapping[str, Path | str]) -> None:
        runs = self._runs()
        for run_id in files:
            failpoint("compact.removing")
            # Fences stay out of the way of nobody: what is merged counts by the merged file alone.
            self._objects.delete(f"runs/{run_id}/{name}" for name in runs.get(run_id, ()))

    def remove_half_made(self) -> None:
        return

    def _in_turn(
        self, who: str, act: Callable[[Turn], T], *, undo: Callable[[], None] = lambda: None
    ) -> T:
        """Do something while nobody else is inside; again, if it took too long."""
        while True:
            try:
                with self._bakery(who).acquire() as turn:
                    result = act(turn)
                    try:
                        turn.confirm()
                    except TurnExpiredError:
                        undo()
                        raise
                    return result
            except TurnExpiredError:
                continue

    def _bakery(self, who: str) -> BakeryMutex:
        return BakeryMutex(
            self._objects,
            "queue",
            who,
            patience_s=self._ttl_s,
            clock=self._clock,
            sleep=self._sleep,
        )

    def _heart(self, name: str) -> Heartbeat:
        return Heartbeat(
            self._objects, name, ttl_s=self._ttl_s, clock=self._clock, also=self._look_at_leases
        )

    def _rival(self, claim: Claim, own: str) -> Owner | None:
        live, _ = self._living()
        live.pop(own, None)
        with self._looking:
            shards = {run: taken.shard for run, taken in self._leases.items()}
        # Of other shards nobody need look at the digests.
        near = [run for run in live if Claim(None, shards.get(run)).meets(claim)]
        self._read_claims([run for run in near if run not in self._claims])
        for run_id in near:
            # One without a claim has ended since; if not, for all that we know it is everything.
            if self._claims.get(run_id, Claim(None)).meets(claim):
                return live[run_id]
        return None

    def _read_claims(self, run_ids: Sequence[str]) -> None:
        found = self._objects.get_all([f"leases/{run_id}.claim" for run_id in run_ids])
        for run_id, data in zip(run_ids, found, strict=True):
            # A damaged one keeps others out for as long as its run lives.
            with contextlib.suppress(CheckpointError):
                if data is not None:
                    self._claims[run_id] = Claim.from_bytes(data)

    def _living(self) -> tuple[dict[str, Owner], dict[str, Owner]]:
        """Look at all leases: whose run is alive, as far as one can tell by now, and whose dead."""
        self._look_at_leases()
        with self._looking:
            leases = self._leases
            silent = {run for run, t in leases.items() if self._watch.silent_s(run) >= t.ttl_s}
        self._declared_dead |= silent
        self._declared_dead |= {run for run, t in leases.items() if t.is_proven_dead()}
        live = {run: t.owner for run, t in leases.items() if run not in self._declared_dead}
        dead = {run: t.owner for run, t in leases.items() if run in self._declared_dead}
        return live, dead

    def _look_at_leases(self) -> None:
        before = self._clock()
        listing = self._objects.list("leases")
        after = self._clock()
        signs: dict[str, dict[str, ObjectInfo]] = {}
        for name, stamp in listing.items():
            run_id, _, kind = name.removeprefix("leases/").partition(".")
            if f"leases/{run_id}.json" in listing and _RUN.fullmatch(run_id):
                signs.setdefault(run_id, {})
                if kind in ("driver", "ledger"):
                    signs[run_id][kind] = stamp
        known = self._leases
        leases = {run_id: known[run_id] for run_id in signs if run_id in known}
        new = [run_id for run_id in signs if run_id not in known]
        read = self._objects.get_all([f"leases/{run_id}.json" for run_id in new])
        for run_id, data in zip(new, read, strict=True):
            if data is not None:
                leases[run_id] = _LeaseFile.parse(run_id, data, self._ttl_s)
        with self._looking:
            self._watch.observe(signs, before=before, after=after)
            self._leases = leases

    def _ranks(self, folder: str) -> dict[int, int]:
        """Return the ranks that were drawn, by the task's index."""
        ranks = {}
        for name in self._objects.list(folder):
            match = re.fullmatch(r"([0-9]+)-([0-9]+)", name.rpartition("/")[2])
            if match:
                ranks[int(match[2])] = int(match[1])
        return ranks

    def _runs(self) -> dict[str, list[str]]:
        """List the segments and fences of each run."""
        runs: dict[str, list[str]] = {}
        for name in sorted(self._objects.list("runs")):
            _, run_id, *rest = name.split("/")
            if _RUN.fullmatch(run_id) and len(rest) == 1:
                runs.setdefault(run_id, []).append(rest[0])
        return runs

    def _read(self, runs: Mapping[str, list[str]]) -> list[Reading]:
        """Read what counts of each run; what cannot be read is said in its reading."""
        # Not before something is read: a process that reads nothing need not load numpy.
        from ray_resume.core.table import Table

        wanted: dict[str, list[str]] = {}
        readings: list[Reading] = []
        for run_id, names in sorted(runs.items()):
            place = f"{self.uri}/runs/{run_id}"
            try:
                counted = counted_segments(names)
            except CheckpointError as error:
                fault = self._unreadable(place, error)
                readings.append(Reading(run_id, place, {}, Table.of(()), fault))
                continue
            if counted:
                wanted[run_id] = counted
        objects = self._objects.get_all(
            [f"runs/{run_id}/{name}" for run_id, names in wanted.items() for name in names]
        )
        for run_id, counted in wanted.items():
            place = f"{self.uri}/runs/{run_id}"
            header: dict[str, Any] = {}
            columns = (bytearray(), bytearray(), bytearray(), bytearray())
            damage: CheckpointError | None = None
            for name, data in zip(counted, objects, strict=False):
                try:
                    found, blocks = decode_segment(_there(data))
                    for block in blocks:
                        for column, more in zip(columns, columns_of(block), strict=True):
                            column += more
                    header = header or found
                except CheckpointError as error:
                    damage = damage or self._unreadable(f"{place}/{name}", error)
            table = Table(*columns) if damage is None else Table.of(())
            readings.append(Reading(run_id, place, header, table, damage))
        return sorted(readings, key=lambda reading: reading.run_id)

    def _without_merged(self, readings: list[Reading]) -> list[Reading]:
        """Leave out the runs that a merged file stands for."""
        merged: set[str] = set()
        for reading in readings:
            if reading.error is None and MERGED in reading.header:
                merged |= merged_headers(reading.path, reading.header).keys()
        return [reading for reading in readings if reading.run_id not in merged]

    def _unreadable(self, place: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"The checkpoint file {place} cannot be read: {error}. If it is damaged, restore it "
            "from a copy, or start over with an empty checkpoint and an empty output folder."
        )

    def _read_identity(self) -> dict[str, Any]:
        try:
            return self._parsed_identity()
        except CheckpointError:
            # Where an object cannot be replaced in one step, half of it may have been there.
            self._sleep(0.2)
            return self._parsed_identity()

    def _parsed_identity(self) -> dict[str, Any]:
        data = self._objects.get(IDENTITY)
        if data is None:
            raise CheckpointError(
                f"There is no checkpoint at {self.uri}. Is the path right? A checkpoint is made "
                "by the first resumable_read that names it."
            )
        try:
            identity = json.loads(data)
            version = identity["format"]
            # It is in the names of output files, so it must not lead elsewhere.
            if re.fullmatch("[0-9a-f]{8}", identity["id"]) is None:
                raise ValueError(f"its id is {identity['id']!r}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"The checkpoint file {self.uri}/{IDENTITY} cannot be read: {error!r}. Restore it "
                "from a copy, or start over with an empty checkpoint and an empty output folder."
            ) from error
        if identity.get("layout") != LAYOUT:
            raise CheckpointError(
                f"The checkpoint {self.uri} was made in a directory of one host's own, and such a "
                "checkpoint cannot be used where hosts share it. Put it back on a local disk, or "
                "start with a new checkpoint and a new output folder here."
            )
        if version != _FORMAT_VERSION:
            raise CheckpointError(
                f"The checkpoint {self.uri} has format {version}, and this ray_resume reads "
                f"format {_FORMAT_VERSION}. Upgrade ray_resume, and run again."
            )
        return dict(identity)

    def _scratch_directory(self) -> Path:
        """Return this host's directory for this checkpoint, nobody else's; made if missing."""
        try:
            if self._scratch is None:
                self._scratch = _own_directory() / self.identity()
            self._scratch.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"The directory {self._scratch or ''} for this host's part of the checkpoint "
                f"{self.uri} cannot be made: {error}. Set TMPDIR to one on a local disk with "
                "space, and run again."
            ) from error
        return self._scratch

    def _tidy_scratch(self, scratch: Path) -> None:
        """Remove what this host's dead runs have left, unless it still proves that they are."""
        for lock in scratch.glob("*.lease"):
            if lock.stem not in self._leases and Lease.is_abandoned(lock):
                for path in (*scratch.glob(f"{lock.stem}.mdb*"), lock):
                    with contextlib.suppress(OSError):
                        path.unlink()


@dataclass(frozen=True)
class _LeaseFile:
    """A lease that was found: its owner, and what may prove that he is dead."""

    owner: Owner
    ttl_s: float
    boot: str | None
    lock: str | None
    shard: tuple[int, int] | None = None

    @classmethod
    def parse(cls, run_id: str, data: bytes, default_ttl_s: float) -> _LeaseFile:
        try:
            values = json.loads(data)
            ttl_s = float(values.pop("ttl_s"))
            boot, lock = values.pop("boot"), values.pop("lock")
            share = values.pop("share")
            shard = None if share is None else Shard(*share)
            owner = Owner.of(values)
            if not (isinstance(boot, str | None) and isinstance(lock, str) and 0 < ttl_s < 1e6):
                raise ValueError("a lease of another make")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            # Known by its name alone, it counts for as long as it gives signs of life.
            return cls(Owner(run_id, "unknown", 0, time.time()), default_ttl_s, None, None)
        part = None if shard is None else (shard.index, shard.count)
        return cls(owner, ttl_s, boot, lock, part)

    def is_proven_dead(self) -> bool:
        """Say whether this host's kernel knows that no process of the run is left."""
        if self.lock is None or self.boot is None or self.boot != _boot():
            return False
        # Containers of one host may not see each other's files: no file proves nothing.
        return Lease.is_abandoned(Path(self.lock))


def _own_directory() -> Path:
    """Return a directory of this host's, and nobody else's; made if missing."""
    user = Path(tempfile.gettempdir(), f"ray_resume-{os.getuid()}")
    if (fstype := network_filesystem_type(user)) is not None:
        raise CheckpointError(
            f"The directory {user} for this host's part of a checkpoint is on a network file "
            f"system ({fstype}), where LMDB and locks cannot be trusted. Set TMPDIR to a directory "
            "on a local disk, and run again."
        )
    with contextlib.suppress(FileExistsError):
        user.mkdir(mode=0o700)
    about = user.lstat()
    if about.st_uid != os.getuid() or about.st_mode & 0o077 or user.is_symlink():
        # Somebody else could put files there.
        user = Path(tempfile.mkdtemp(prefix="ray_resume-"))
    return user


def _there(data: bytes | None) -> bytes:
    if data is None:
        raise CheckpointError("it is gone")
    return data


def _boot() -> str | None:
    """Return what tells this host's kernel, since it was started, from every other one."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return None
