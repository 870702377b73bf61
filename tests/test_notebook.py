"""Notebooks show HTML in which none of the user's data is markup."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from html_text import HtmlText

from ray_resume import Checkpoint, RunSummary
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.records import Record, State

HOSTILE = "</td><script>alert('x')</script>\"'><img src=x onerror=y>&\x00\x1b[31m\udce9\u202e"


class Page(HtmlText):
    """The text of a fragment."""

    tags = frozenset({"div", "table", "tr", "td", "th"})
    attributes = frozenset({"style", "title", "role", "aria-label"})


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    storage = LocalBackend(tmp_path / "ckpt <b>")
    storage.ensure()
    storage.bind(f"/data/{HOSTILE}", "")
    Lease.acquire(storage.path, Owner("run2", HOSTILE, 1, 5.0), Claim(None), wait_s=0).release()
    history = storage.history()
    history.begin("run1", {"started_at": time.time() - 60, "host": HOSTILE})
    history.end("run1", {"ended_at": time.time(), "outcome": "failed", "error": HOSTILE * 100})
    writer = WriterFile.create(storage.path, "run1", {"sources_total": 2000})
    writer.commit(
        [
            Record(HOSTILE, State.FAILED, 1, "run1", error=HOSTILE, failed_runs=1),
            Record("b", State.COMPLETED, 2, "run1", 1500, dead_rows=1, dead_letters=("l",)),
        ]
    )
    writer.close()
    return storage.path


def test_a_checkpoint_shows_its_status(hostile: Path) -> None:
    checkpoint = Checkpoint(hostile)
    text = Page(checkpoint._repr_html_()).text
    assert "1 of 2,000 sources completed (0.1 %)" in text
    assert str(hostile) in text
    assert "1,500 rows in 0 files" in text
    assert "1 row of 1 source" in text
    assert "Last run failed " in text
    assert "<script>alert" in text  # As text.
    alone = Page(checkpoint.status()._repr_html_()).text
    assert "1 of 2,000 sources completed (0.1 %)" in alone
    assert str(hostile) not in alone


def test_a_checkpoint_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "There is no checkpoint" in Page(Checkpoint(tmp_path / "<i>")._repr_html_()).text
    LocalBackend(tmp_path / "new").ensure()
    assert "0 of 0 sources completed" in Page(Checkpoint(tmp_path / "new")._repr_html_()).text


def test_a_summary_shows_itself() -> None:
    summary = RunSummary("run1", 5000, 1200, 3797, 1, 1, 1, 30, 25, 5, 1, 100.0)
    text = Page(replace(summary, lost_alone={HOSTILE: HOSTILE})._repr_html_()).text
    assert "4,997 of 5,000 sources completed" in text
    for part in (
        "3,797 sources",
        "Failed 1 source ",
        "30 read, 25 written",
        "1 min 40 s",
        "5 rows",
    ):
        assert part in text
    assert "<script>alert" in text
    assert "5,000" in json.dumps(str(summary))


def test_a_summary_counts_as_people_do() -> None:
    one = RunSummary("run1", 1, 1, 0, 0, 0, 0, 1, 1, 0, 1, 1.0)
    assert str(one) == (
        "Run run1: 0 of 1 source completed in 1.0 s, 1 was done before. 1 row read, 1 written to 1 "
        "file."
    )
    left = replace(one, sources_total=4, sources_failed=1, sources_pending=1, sources_quarantined=1)
    assert str(left).endswith(
        "1 source failed; the next run reads it again. 1 source is quarantined: too many runs "
        "failed there. Runs skip quarantined sources until a reset. 1 source is pending; run again "
        "to go on."
    )
