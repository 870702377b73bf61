"""The lines of a run in the log: at its start, while it goes on, at its end, and while it waits."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from children import run_python
from conftest import ids_in, write_source

import ray_resume
from ray_resume import Checkpoint, resumable, resumable_read, resumable_write
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.run.display import LogDisplay

BAR_DRIVER = Path(__file__).parent.parent / "drivers" / "bar_driver.py"
VERSIONS = f"ray_resume {ray_resume.__version__} with Ray {ray.__version__}"


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what ray_resume has logged; Ray logs, too."""
    return [record.getMessage() for record in caplog.records if record.name == "ray_resume"]


@resumable
def slow(batch: Any) -> Any:
    time.sleep(0.3)
    return batch


def write(folder: Path, *, progress: bool | None = None) -> ray_resume.RunSummary:
    checkpoint = str(folder / "checkpoint")
    ds = resumable_read(ray.data.read_parquet, str(folder / "in"), checkpoint=checkpoint)
    ds = ds.map_batches(slow, batch_format="pandas")
    return resumable_write(ds, str(folder / "out"), commit_interval_s=0.1, progress=progress)


@pytest.mark.usefixtures("cluster", "source")
def test_a_run_says_what_it_has_to_do_how_far_it_is_and_what_it_did(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LogDisplay, "interval_s", 0.1)
    caplog.set_level(logging.INFO, "ray_resume")
    summary = write(tmp_path, progress=True)
    start, *between, end = lines(caplog)
    assert start == (
        f"Run {summary.run_id}: checkpoint {tmp_path / 'checkpoint'} (new), output "
        f"{tmp_path / 'out'}: 0 of 7 sources done, 7 to do. This is {VERSIONS}."
    )
    assert end == str(summary)
    assert between
    for line in between:
        assert re.match(
            rf"Run {summary.run_id}: \d of 7 sources \(\d+ %\) completed, \d+ row", line
        )
    assert any(re.search(r"\d+ rows? at risk", line) for line in between)

    caplog.clear()
    write_source(tmp_path / "in", files=7, rows=100)
    ids = sorted(Checkpoint(tmp_path / "checkpoint").sources(), key=lambda source: source.source_id)
    Checkpoint(tmp_path / "checkpoint").reset([ids[0].source_id])
    write(tmp_path)
    start, *rest = lines(caplog)
    # The cluster of the tests has Ray's progress off.
    assert "(it goes on)" in start
    assert "done" in start
    assert len(rest) == 1


@pytest.mark.usefixtures("cluster", "source")
def test_no_line_is_logged_if_none_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ray_resume")
    write(tmp_path, progress=False)
    assert lines(caplog) == []
    assert ids_in(tmp_path / "out") == list(range(600))


def test_a_run_that_waits_says_so_at_once_and_for_whom(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = LocalBackend(tmp_path)
    storage.ensure()
    first = storage.acquire(Owner.here("a" * 16), Claim(None), wait_s=0)
    timer = threading.Timer(0.5, first.end, kwargs={"wait_s": 0})
    timer.start()
    storage.acquire(Owner.here("b" * 16), Claim(None), wait_s=60).end(wait_s=0)
    timer.join()
    (line,) = lines(caplog)
    assert line.startswith(f"Run {'b' * 16} waits up to 60 s for run {'a' * 16} (host ")
    assert str(tmp_path) in line


@pytest.mark.parametrize("configured", ["", "logging.basicConfig(level='WARNING')"])
def test_lines_are_on_the_console_unless_logging_is_configured(configured: str) -> None:
    script = (
        f"import logging\n{configured}\n"
        "from ray_resume.run.display import show_log\n"
        "show_log(); show_log()\n"
        "logger = logging.getLogger('ray_resume')\n"
        "logger.info('a line'); logger.warning('a warning')\n"
        "logging.basicConfig(format='now by root: %(message)s', force=True)\n"
        "logger.warning('a last warning')\n"
    )
    shown = run_python(script, check=True).stderr.splitlines()
    *before, last = shown
    if configured:
        assert before == ["WARNING:ray_resume:a warning"]
    else:
        assert [line.split("\t")[1].split()[0] for line in before] == ["INFO", "WARNING"]
    assert last == "now by root: a last warning"


@pytest.mark.extended
def test_a_terminal_has_a_bar_above_those_of_ray_data(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, str(BAR_DRIVER), str(tmp_path)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    shown = b""
    # Reading ends by an error once the terminal has no other end.
    with contextlib.suppress(OSError):
        while some := os.read(terminal, 1 << 16):
            shown += some
    assert os.waitpid(process, 0)[1] == 0
    text = shown.decode()
    bars = re.findall(r"Run \w+: *(\d+)%\|.*?\| (\d+)/12 sources, ([^\r\n\x1b]*)", text)
    assert len(bars) > 3
    assert bars[-1][:2] == ("100", "12")
    assert any("row at risk" in details or "rows at risk" in details for *_, details in bars)
    # Ray Data's own bars are there, and no line in the log besides.
    assert "Running Dataset" in text
    assert "% completed" not in text
