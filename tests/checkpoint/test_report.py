"""The HTML report: what it says, that nothing in it is markup, and that it stays small."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_text import HtmlText
from report_checkpoints import HOSTILE, PAUSE_S, STAGES, START, Maker
from typing_extensions import override

from ray_resume import Checkpoint, ResumeError, cli
from ray_resume.checkpoint.history import RunHistory, RunRecord
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.report.facts import ReportFacts, facts_of
from ray_resume.checkpoint.report.timeline import Timeline
from ray_resume.core.failure_log import FailureLog, split_reason

if not os.environ.get("CI"):
    pytest.importorskip("altair", reason="the extra [report] is not installed")

# It needs none of the libraries whose oldest versions are tested.
pytestmark = pytest.mark.long

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")


class Page(HtmlText):
    """The text of a page, its scripts, and its policy."""

    tags = frozenset(
        {
            *("html", "head", "meta", "title", "style", "body", "main", "header", "section"),
            *("footer", "h1", "h2", "h3", "p", "div", "ul", "li", "span", "b", "code", "pre"),
            *("br", "table", "tr", "th", "td", "details", "summary", "script"),
        }
    )
    attributes = frozenset(
        {"lang", "charset", "http-equiv", "content", "name", "class", "id", "type"}
    )
    empty = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        self.scripts: list[str] = []
        self.policy = ""
        super().__init__(page)

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        if dict(attrs).get("http-equiv"):
            self.policy = dict(attrs)["content"] or ""
        if tag == "script":
            self.scripts.append("")

    @override
    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += data
        elif self.open[-1:] != ["style"]:
            super().handle_data(data)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Maker(tmp_path_factory.mktemp("small") / "data", 100).make()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = "a <b>&\u2028c"
    return Maker(tmp_path_factory.mktemp("hostile") / name, 100, HOSTILE).make()


def facts(path: Path) -> ReportFacts:
    return facts_of(LocalBackend(path), START + 1e6, lambda sink: [])


def page(path: Path, folder: Path) -> Page:
    written = Checkpoint(path).report(folder / "report.html")
    assert written == str(folder / "report.html")
    assert os.listdir(folder) == ["report.html"]
    return Page(Path(written).read_text("utf-8"))


def charts(of: Page) -> dict[str, Any]:
    (data, *_) = of.scripts
    found: dict[str, Any] = json.loads(data)
    return found


def test_what_happened_is_told(small: Path) -> None:
    said = facts(small)
    assert said.status.completed == 96
    assert [run.outcome for run in said.runs] == ["killed", "failed", "killed", "incomplete"]
    assert [crash.rows_lost for crash in said.crashes] == [100, 200, 300]
    assert [crash.wait_s for crash in said.crashes] == [PAUSE_S] * 3
    assert (said.rows_lost, said.waited_s) == (600, 3 * PAUSE_S)
    assert said.share_lost == pytest.approx(600 / (95 * 200 + 600))
    groups = {(group.stage, group.error): group.count for group in said.failures.groups}
    assert groups == {
        ("map_batches(decode)", "ValueError: bad image … …"): 2,
        ("read", "OSError: block … is damaged"): 2,
        ("", "rows unaccounted for: its read did not finish"): 1,
    }
    (letters,) = said.letters.groups
    assert (letters.stage, letters.error, letters.count) == (
        "map(paint)",
        "ValueError: bad pixel …",
        3,
    )
    assert said.points[-1].sources == 96
    assert said.points[-1].rows == 95 * 200
    per_bin = said.timeline.length * said.timeline.unit_s / len(said.bins)
    assert sum(one.sources_per_s * per_bin for one in said.bins) == pytest.approx(96)
    assert said.files is not None
    assert (said.files.count, said.files.smallest) == (4, 1000)
    assert sum(count for _, _, count in said.files.bins) == 4
    assert [(slow.seconds, slow.rows) for slow in said.slowest[:2]] == [(29.0, 200), (29.0, 200)]
    assert {one.name: one.rows_in for one in said.stages} == {
        name: 2 * int(numbers["rows_in"]) for name, numbers in STAGES.items()
    }


@pytest.mark.extended
def test_nothing_of_the_data_is_markup(hostile: Path, tmp_path: Path) -> None:
    found = page(hostile, tmp_path)
    shown = HOSTILE.encode("unicode_escape").decode().replace("\\\\", "\\")
    assert found.text.count(shown[:40]) > 20
    assert "\\udce9" in found.text
    assert "{{7*7}}" in found.text
    assert "<" not in found.scripts[0]
    assert len(charts(found)) == 8


def test_the_browser_runs_only_our_scripts(small: Path, tmp_path: Path) -> None:
    found = page(small, tmp_path)
    allowed = re.findall(r"'(sha256-[^']+)'", found.policy)
    hashes = [
        f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
        for script in found.scripts[1:]
    ]
    assert hashes == allowed
    assert "default-src 'none'" in found.policy
    assert "unsafe-eval" not in found.policy


def test_an_empty_checkpoint_has_a_report(tmp_path: Path) -> None:
    storage = LocalBackend(tmp_path / "ckpt")
    storage.ensure()
    (tmp_path / "out").mkdir()
    found = page(tmp_path / "ckpt", tmp_path / "out")
    assert "No run has used this checkpoint yet." in found.text
    assert charts(found) == {}


def test_odd_records_do_not_break_a_report(tmp_path: Path) -> None:
    path = Maker(tmp_path / "data", 20).make()
    history = LocalBackend(path).history()
    for number, start in enumerate([-1e300, 0, 5e11, START + 1e9]):
        facts_of_run: dict[str, Any] = {"started_at": start, "host": "h"}
        history.begin(f"odd{number}", facts_of_run)
        odd = {"a": None, "b": "x", "c": 1e400, "d": [1], "e": True, "f": -5}
        stages = {"s": {"rows_in": 1e400, "udf_s": "long", "calls": -1}, "t": 5}
        end = {"ended_at": start, "outcome": "killed", "rows_at_risk": -7}
        history.end(f"odd{number}", {**end, "slowest": odd, "stages": stages})
    shutil.rmtree(tmp_path / "data" / "out")
    (tmp_path / "to").mkdir()
    found = page(path, tmp_path / "to")
    assert "4 listed files are not in the folder" in found.text


def test_a_pause_that_prevails_is_cut_out() -> None:
    day = Timeline.of([(0.0, 600.0), (86400.0, 87000.0), (300.0, 700.0)])
    assert day.is_cut
    assert day.unit == "minutes"
    assert day.length == pytest.approx(1300 / 60)
    moments = np.array([0.0, 650.0, 40000.0, 86400.0, 86700.0])
    assert (day.place(moments) * 60).tolist() == pytest.approx([0, 650, 700, 700, 1000])
    assert day.moment(day.place(moments[[0, 1, 4]])).tolist() == pytest.approx([0, 650, 86700])
    close = Timeline.of([(100.0, 700.0), (800.0, 900.0)])
    assert not close.is_cut
    assert (close.place(np.array([100.0, 750.0])) * 60).tolist() == pytest.approx([0, 650])
    assert not Timeline.of([])


def test_the_stage_of_a_failure_is_found_again() -> None:
    log = FailureLog()
    log.add(1, 5, 1, "map_batches(f): ValueError: a: b\nc")
    log.add(2, 5, 3000, "OSError: no: such file", read=True)
    assert split_reason(log.why(1) or "") == ("map_batches(f)", "ValueError: a: b\nc")
    assert split_reason(log.why(2) or "") == ("read", "OSError: no: such file")
    assert split_reason("a worker died: alone") == ("", "a worker died: alone")


def test_a_merge_keeps_only_the_slowest_sources_of_all(tmp_path: Path) -> None:
    storage = LocalBackend(tmp_path)
    storage.ensure()
    records = [
        RunRecord(
            f"run{n}", 1.0 + n, 2.0, "h", "completed", slowest={f"{n}-{i}": n for i in range(20)}
        )
        for n in range(30)
    ]
    storage.history().merge("by", records)
    kept: dict[str, Any] = {}
    for known in RunHistory(storage.history()._objects).read().values():
        kept |= known["slowest"]
    assert len(kept) == 100
    assert min(kept.values()) == 25


def test_the_command_says_where_the_report_is(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "r.html"
    assert cli.main(["report", str(small), "-o", str(target)]) == 0
    assert capsys.readouterr().out == f"The report is in {target}.\n"
    assert target.stat().st_size < 1_200_000
    assert cli.main(["report", str(small), "-o", str(tmp_path / "none" / "r.html")]) == 1
    assert re.fullmatch(
        r"ray-resume: The report cannot be written to .*/none/r.html: No such file.*\n",
        capsys.readouterr().err,
    )
    assert cli.main(["report", str(tmp_path / "no")]) == 1
    assert "There is no checkpoint at" in capsys.readouterr().err


def test_without_the_chart_library_the_error_says_what_to_install(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if ".checkpoint.report.page" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "ray_resume.checkpoint.report.charts", raising=False)
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(ResumeError, match=r"pip install 'ray-resume\[report\]'"):
        Checkpoint(small).report(tmp_path / "r.html")
    assert os.listdir(tmp_path) == []


@pytest.mark.extended
def test_a_report_of_100_000_sources_is_small_and_quick(tmp_path: Path) -> None:
    path = Maker(tmp_path / "data", 100_000).make()
    Page("")  # The library is loaded by any test before.
    before = time.process_time()
    written = Path(Checkpoint(path).report(tmp_path / "report.html"))
    assert time.process_time() - before < 10
    assert written.stat().st_size < 1_200_000
    assert "95,001 of 100,001 sources completed" in written.read_text("utf-8")


def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is installed, none of {', '.join(BROWSERS)}")
    return found


def browse(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,2000"]
    command += ["--disable-background-networking", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={file.parent / 'profile'}", "--virtual-time-budget=20000"]
    command += [*options, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)


@pytest.mark.extended
def test_a_browser_draws_the_charts_offline(hostile: Path, tmp_path: Path) -> None:
    found = page(hostile, tmp_path)
    report, log = tmp_path / "report.html", tmp_path / "net.json"
    drawn = browse(report, f"--log-net-log={log}", "--dump-dom")
    assert "CONSOLE" not in drawn.stderr
    assert "pwned" not in re.findall("<title>(.*?)</title>", drawn.stdout)[0]
    dom = re.sub(r"<script.*?</script>", "", drawn.stdout, flags=re.DOTALL)
    for name in charts(found):
        assert re.search(f'class="[^"]*drawn[^"]*" id="chart-{name}"', dom), name
    assert dom.count("<svg") == len(charts(found))
    assert not re.search("<img|<b>&", dom)
    assert "pwned" in html.unescape(dom)
    events = json.loads(log.read_text())["events"]
    asked = {event["params"]["url"] for event in events if "url" in event.get("params", {})}
    assert {url for url in asked if not url.startswith("file:")} == set()


@pytest.mark.extended
def test_a_page_is_light_or_dark_as_the_browser_is(small: Path, tmp_path: Path) -> None:
    from PIL import Image

    page(small, tmp_path)
    brightness = []
    for scheme in (0, 1):
        shot = tmp_path / f"{scheme}.png"
        dark = f"--blink-settings=preferredColorScheme={scheme}"
        browse(tmp_path / "report.html", dark, f"--screenshot={shot}")
        brightness.append(np.asarray(Image.open(shot).convert("L")).mean())
    assert brightness[0] < 80
    assert brightness[1] > 200
