"""The sources of `scale.py`: any number of files, and where their rows are."""

from __future__ import annotations

from typing import Any

from ray_resume.core.parts import FilePart

RUN = "0123456789ab"
SIGNATURE = "ReadParquet -> MapBatches(clean) -> write_parquet"
SIZE, MTIME_NS = 1_000_000, 1_700_000_000_000_000_000


def path_of(number: int) -> str:
    """Return the path of a source: 56 characters."""
    return f"bucket/dataset/year=2024/part-{number:09d}.snappy.parquet"


def file_of(checkpoint: str, number: int, key: bytes) -> str:
    """Return the name of its output file."""
    return f"{checkpoint}-{RUN}-{key[:8].hex()}-{number:016x}.parquet"


def sources_of(count: int) -> Any:
    """Return a table of ``count`` files."""
    from ray_resume.core.sources import SourceTable

    paths = [path_of(number) for number in range(count)]
    return SourceTable.of_files(paths, [SIZE] * count, [MTIME_NS] * count)


def parts_of(numbers: range, digests: bytes, each: int) -> list[FilePart]:
    """Say where the rows of some sources are, ten each: ``each`` of them share a file."""
    from ray_resume.core.filenames import stem_of

    prefix = f"aaaaaaaa-{RUN}"
    parts = []
    for start in range(0, len(numbers), each):
        some = numbers[start : start + each]
        digest = digests[16 * some[0] : 16 * some[0] + 8] if len(some) == 1 else None
        name = f"{stem_of(prefix, digest)}.parquet"
        parts += [FilePart(name, 10 * place, 10, 10 * len(some)) for place in range(len(some))]
    return parts
