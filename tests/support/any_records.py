"""Any records of a few sources and runs, with files of their own and with shared ones."""

from __future__ import annotations

from hypothesis import strategies as st

from ray_resume.core.digests import source_digest
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Fingerprint, Record, State, pipeline_hash

RUNS = ["0123456789ab", "0123456789ac", "run"]
NAMES = ["a", "b", "c", "\udcff", "d" * 600]


def usual_file(source_id: str, run_id: str, number: int) -> str:
    return f"aaaaaaaa-{run_id}-{source_digest(source_id)[:8].hex()}-{number:016x}.parquet"


def shared_file(number: int) -> str:
    return f"aaaaaaaa-{RUNS[0]}-{'0' * 16}-{number:016x}.parquet"


@st.composite
def records(draw: st.DrawFn, source_id: str) -> Record:
    run_id = draw(st.sampled_from(RUNS))
    own = usual_file(source_id, RUNS[0], draw(st.integers(0, 2)))
    # A source may have several parts in a file that it shares.
    shared = st.sampled_from([shared_file(1), shared_file(2), "k=1/" + own, "odd"])
    part = st.builds(FilePart, shared, st.integers(0, 2), st.integers(1, 2), st.just(4))
    parts = st.lists(st.just(FilePart(own, 0, 3, 3)) | part, max_size=3, unique=True)
    return Record(
        source_id,
        draw(st.sampled_from(State)),
        draw(st.integers(1, 3)),
        run_id,
        rows=draw(st.integers(0, 3)),
        parts=tuple(draw(parts)),
        error=draw(st.sampled_from([None, "boom"])),
        failed_runs=draw(st.integers(0, 2)),
        fingerprint=draw(fingerprints),
        pipeline=pipeline_hash(draw(st.sampled_from(["now", "then", ""]))),
    )


fingerprints = st.builds(Fingerprint, st.sampled_from([None, 0, 1]), st.sampled_from([None, 0, 1]))
records_of_any = st.sampled_from(NAMES[:3]).flatmap(records)
on_record = st.lists(st.sampled_from(NAMES), unique=True).flatmap(
    lambda names: st.tuples(*(records(name) for name in names))
)
