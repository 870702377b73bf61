"""The README's example and the guides in `examples/` do what they say, from an empty folder.

A Python block is executed in this process, or saved if its first line is the name of a script. A
shell block is executed in the folder. A block of text that is marked ``<!-- prints -->`` is what
the block above prints, where ``...`` stands for anything.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from guides import blocks
from job import WITHOUT_TOKENS
from PIL import Image
from places import ROOT, TESTS
from ray.data import Dataset

from ray_resume import resumable_read, resumable_write

EXAMPLES = ROOT / "examples"
INDEX = EXAMPLES / "README.md"
PAGES = [ROOT / "README.md", *sorted({*EXAMPLES.glob("*.md")} - {INDEX})]
# They say everything about something, and are not read from the first word to the last.
REFERENCES = {"README", "failing_sources", "inspect_and_steer", "what_works"}
MAX_WORDS = 400
IN_THE_SUITE = {"README"}
# They name most of Ray's readers and sinks, whose older versions differ.
WITH_OLD_VERSIONS = {"README", "what_works", "tables"}
# Their scripts are drivers of their own, which may be killed.
WITH_DRIVERS = {"kubernetes", "resume_a_pipeline"}
# They assume some input.
ASSUME_INPUT = {"README", "inspect_and_steer"}
# Where the pages have an S3 server.
SERVER = "127.0.0.1:5000"

FILE = re.compile(r"# ([\w.]+)\n")
NUMBER = re.compile(r"\d[\d,.]*|[#.]{40}")
PLURAL = re.compile(r"(?<=0 )(file|row|source)s")
GAP = re.compile(r" {2,}")
RUN_ID = re.compile(r"\b[0-9a-f]{12}\b")


def pages() -> list[Any]:
    return [
        pytest.param(
            page,
            id=page.stem,
            marks=[
                *([] if page.stem in IN_THE_SUITE else [pytest.mark.extended]),
                *([] if page.stem in WITH_OLD_VERSIONS else [pytest.mark.long]),
            ],
        )
        for page in PAGES
    ]


def without_numbers(text: str) -> str:
    return GAP.sub("  ", PLURAL.sub(r"\1", NUMBER.sub("0", text)))


def check_printed(mark: str, shown: str, printed: str) -> None:
    """Compare what a page shows with what its block has printed."""
    shown, printed = (RUN_ID.sub("RUN", text).rstrip() for text in (shown, printed))
    if mark.endswith("with other numbers"):
        shown, printed = map(without_numbers, (shown, printed))
    pattern = re.escape(shown).replace(r"\.\.\.", ".*")
    assert re.fullmatch(pattern, printed, re.DOTALL), f"Printed:\n{printed}\nShown:\n{shown}"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # A page may set it, and may fail before it unsets it.
    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "checkpoint_config", context.checkpoint_config)
    return tmp_path


def write_input(folder: Path) -> None:
    """Write the input of the pages that assume one: two files of 100 rows, five images."""
    (folder / "raw").mkdir()
    (folder / "images").mkdir()
    for number in range(5):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "images" / f"{number}.png")
    for number in range(2):
        ids = range(100 * number, 100 * (number + 1))
        text = ["some text" if i % 3 else "" for i in ids]
        table = pa.table({"id": ids, "url": [f"https://{i}.example" for i in ids], "text": text})
        pq.write_table(table, folder / "raw" / f"{number}.parquet")


@pytest.mark.parametrize("page", pages())
def test_the_blocks_of_a_page_run(
    page: Path, workplace: Path, request: pytest.FixtureRequest
) -> None:
    environment = environment_of(page, request)
    names: dict[str, object] = {"__name__": page.stem}
    if page.stem in ASSUME_INPUT:
        write_input(workplace)
    if page.stem == "inspect_and_steer":
        ds = resumable_read(ray.data.read_parquet, "raw/", checkpoint="ckpt/")
        resumable_write(ds, "out/")
    printed: str | None = ""
    for mark, language, shown in blocks(page):
        text = shown
        if SERVER in shown:
            text = shown.replace(SERVER, f"127.0.0.1:{request.getfixturevalue('s3').port}")
        if mark.startswith("prints"):
            if printed is not None:
                check_printed(mark, shown, printed.replace(str(workplace), "/data"))
        elif mark and not is_installed(mark):
            printed = None
        elif name := FILE.match(text):
            (workplace / name[1]).write_text(text)
        elif language == "bash":
            printed = shell(text, workplace, environment)
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(text, str(page), "exec"), names)
            printed = output.getvalue()


def environment_of(page: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    """Start what the page needs; return the environment of its commands."""
    found = {**WITHOUT_TOKENS, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if page.stem in WITH_DRIVERS:
        return {**found, "RAY_ADDRESS": request.getfixturevalue("another_cluster")}
    request.getfixturevalue("cluster")
    return found


def is_installed(mark: str) -> bool:
    """Return whether a block can be executed, by its mark ``needs: MODULE``."""
    needs, _, module = mark.partition(": ")
    return needs == "needs" and importlib.util.find_spec(module) is not None


def shell(commands: str, folder: Path, environment: dict[str, str]) -> str:
    """Run commands as a user would, and return what they print."""
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_rayjob_is_one() -> None:
    [text] = [
        block.text for block in blocks(EXAMPLES / "kubernetes.md") if block.language == "yaml"
    ]
    schema = json.loads((TESTS / "support" / "rayjob_schema.json").read_text())
    job = yaml.safe_load(text)
    jsonschema.validate(job, schema)
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    for damage in ({"backofLimit": 5}, {"shutdownAfterJobFinishes": "true"}, {"entrypoint": None}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**job, "spec": {**job["spec"], **damage}}, schema)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_guide_is_short(page: Path) -> None:
    words = len(page.read_text().split())
    assert page.stem in REFERENCES or words <= MAX_WORDS, f"{words} words"


def test_every_link_leads_somewhere_and_the_index_has_every_guide() -> None:
    guides = {page.name for page in PAGES if page.parent == EXAMPLES}
    assert guides <= set(re.findall(r"\]\((\w+\.md)\)", INDEX.read_text()))
    for page in [*PAGES, INDEX, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_reader_and_writer_of_ray_data_is_in_the_tables() -> None:
    """A new release that brings one fails here, until the page says what becomes of it."""
    page = (EXAMPLES / "what_works.md").read_text()
    named = set(re.findall(r"\w+", page))
    readers = {name for name in dir(ray.data) if name.startswith(("read_", "range"))}
    writers = {name for name in dir(Dataset) if name.startswith("write_")}
    assert {name for name in readers if callable(getattr(ray.data, name))} - named == set()
    # Formats and systems are named there, as a rule.
    systems = {name.lower() for name in named} | {"datasink"}
    assert {name for name in writers - named if name.removeprefix("write_") not in systems} == set()
