"""A run looks for its files before it writes to a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ray_resume import CheckpointError
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record, State
from ray_resume.write.folder import folder_at
from ray_resume.write.output import FolderOutput


def test_all_sources_of_a_file_that_is_gone_are_told(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path / "ckpt")
    identity = backend.ensure()
    (tmp_path / "out").mkdir()
    writer = WriterFile.create(backend.path, "run1", {})
    parts = [FilePart("shared.parquet", 5 * n, 5, 10) for n in range(2)]
    writer.commit(
        Record(source, State.COMPLETED, n, "run1", 5, (part,))
        for n, (source, part) in enumerate(zip("ab", parts, strict=True), 1)
    )
    writer.close()
    contents = backend.snapshot()
    skipped = contents.snapshot.records(np.arange(2))
    output = FolderOutput(folder_at(str(tmp_path / "out")), append=False)
    with pytest.raises(CheckpointError) as raised:
        output.verify(identity, backend, [], contents, skipped)
    assert "1 output file of 2 completed sources is gone" in str(raised.value)
    assert "reset(['a', 'b'])" in str(raised.value)
    output.verify(identity, backend, ["shared.parquet"], contents, skipped)
