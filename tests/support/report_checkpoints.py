"""Checkpoints to report on, in the real store: with crashes, failures and hostile names."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.messages import DeadLetter
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Fingerprint, Record, State

START = 1.75e9
PAUSE_S = 9 * 3600
HOSTILE = (
    "</script><script>document.title='pwned'</script></td>\"'><img src=x onerror=\"document.title"
    "='pwned'\">{{7*7}}&amp;\x00\x1b[31m\udce9\u202e\u2028<!--<b>"
)

# How each run ends, after how many seconds, with which share of the sources.
RUNS = (
    ("killed", 700, 0.35),
    ("failed", 300, 0.15),
    ("killed", 900, 0.2),
    ("incomplete", 800, 0.25),
)
STAGES: dict[str, dict[str, float]] = {
    "map_batches(decode)": {"rows_in": 900, "rows_out": 880, "calls": 30, "batches": 30},
    "map_batches(Embed)": {"rows_in": 880, "rows_out": 880, "calls": 110, "udf_s": 380.25},
}
_AT_ONCE = 5000


class Maker:
    """Makes a checkpoint of ``count`` sources, a run after another."""

    def __init__(self, root: Path, count: int, hostile: str = "") -> None:
        root.mkdir(parents=True)
        self.storage = LocalBackend(root / "ckpt")
        self._identity = self.storage.ensure()
        self._out = root / "out"
        self._out.mkdir()
        self.storage.bind(str(self._out), "")
        self._count = count
        self._hostile = hostile
        self._random = random.Random(1)
        self._sequence = 0

    def make(self) -> Path:
        begin = START
        for number, (outcome, lasted, share) in enumerate(RUNS):
            run_id = f"{number:012x}"
            history = self.storage.history()
            host = {"host": f"node-1{self._hostile}", "pid": 4, "sources_total": self._count}
            history.begin(run_id, {"started_at": begin, **host})
            done = int(self._count * share)
            records = list(self._completed(run_id, begin, lasted, done))
            slowest = {record.source_id: 10.0 + n for n, record in enumerate(records[:20])}
            if outcome == "incomplete":
                records += [*self._failed(run_id, begin + lasted), self._with_letters(run_id)]
            writer = WriterFile.create(self.storage.path, run_id, {"sources_total": self._count})
            for start in range(0, len(records), _AT_ONCE):
                writer.commit(records[start : start + _AT_ONCE])
            writer.close()
            counts: dict[str, Any] = {"rows_read": done * 200, "slowest": slowest}
            counts["rows_at_risk"] = 100 * (number + 1) if outcome != "incomplete" else 0
            if outcome == "killed":
                history.sign(run_id, {"at": begin + lasted, **counts})
            else:
                error = (
                    f"RuntimeError: out of memory{self._hostile}" if outcome == "failed" else None
                )
                end = {"outcome": outcome, "ended_at": begin + lasted, "error": error}
                stages = {f"{name}{self._hostile}": value for name, value in STAGES.items()}
                history.end(run_id, {**counts, **end, "sources_completed": done, "stages": stages})
            begin += lasted + PAUSE_S
        return Path(self.storage.path)

    def _completed(self, run_id: str, begin: float, lasted: float, done: int) -> Iterator[Record]:
        """Yield completed sources; 60 share a file."""
        for number in range(done):
            first, rows = number % 60, 200
            if not first:
                stem = f"{self._random.getrandbits(64):016x}"
                file = f"{self._identity}-{run_id}-{0:016x}-{stem}.parquet"
                (self._out / file).write_bytes(bytes(1000 + number))
            whole = rows * min(60, done - number + first)
            self._sequence += 1
            yield Record(
                f"raw/part-{self._sequence:06d}.parquet{self._hostile}",
                State.COMPLETED,
                self._sequence,
                run_id,
                rows,
                (FilePart(file, first * rows, rows, whole),),
                completed_at=begin + lasted * (number + 1) / (done + 1),
                fingerprint=Fingerprint(1 << 20, 1),
            )

    def _failed(self, run_id: str, at: float) -> Iterator[Record]:
        reasons = (
            "7 rows failed, the first in map_batches(decode): ValueError: bad image {n} 'x{n}.jpg' "
            "(/home/me/pipe.py:12, in decode)",
            "its reader failed after 3 rows: OSError: block {n} is damaged",
            "rows unaccounted for: its read did not finish",
        )
        for number in range(max(3, self._count // 20)):
            self._sequence += 1
            yield Record(
                f"raw/bad-{number:05d}.parquet{self._hostile}",
                State.QUARANTINED if number % 5 == 4 else State.FAILED,
                self._sequence,
                run_id,
                error=reasons[number % 3].format(n=number) + self._hostile,
                failed_runs=1,
                failed_at=at,
            )

    def _with_letters(self, run_id: str) -> Record:
        hostile = self._hostile.replace("\udce9", "")
        errors = [f"ValueError: bad pixel {n}{hostile}" for n in range(3)]
        rows = pa.table({"x": [1, 2, 3], "ray_resume_error": ["not", "this", "one"]})
        letter = DeadLetter.of(0, 1, f"map(paint){hostile}", rows, errors)
        source_id = f"raw/letters{self._hostile}"
        name = self.storage.dead_letters().write(run_id, source_id, letter)
        self._sequence += 1
        return Record(
            source_id,
            State.COMPLETED,
            self._sequence,
            run_id,
            completed_at=START,
            dead_rows=3,
            dead_letters=(name,),
        )
