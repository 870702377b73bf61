"""The README's example and the guides in `examples/` do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from places import ROOT

from ray_resume import resumable_read, resumable_write

PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md"))]
BLOCK = re.compile(r"(<!-- (?:not )?run: [^\n]* -->\n)?```(python|bash)\n(.*?)```", re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the language and text of each block that the page does not mark otherwise."""
    return [(lang, text) for mark, lang, text in BLOCK.findall(page.read_text()) if not mark]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the input of the guides: two files of 100 rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()
    for number in range(2):
        ids = range(100 * number, 100 * (number + 1))
        text = ["some text" if i % 3 else "" for i in ids]
        table = pa.table({"id": ids, "url": [f"https://{i}.example" for i in ids], "text": text})
        pq.write_table(table, tmp_path / "raw" / f"{number}.parquet")
    return tmp_path


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page: Path, workplace: Path) -> None:
    if page.stem == "inspect_and_steer":
        ds = resumable_read(ray.data.read_parquet, "raw/", checkpoint="ckpt/")
        resumable_write(ds, "out/")
    bare = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    names: dict[str, object] = {"__name__": page.stem}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, str(page), "exec"), names)
        else:
            command = ["bash", "-euo", "pipefail", "-c", text]
            subprocess.run(command, check=True, cwd=workplace, env=bare, stdout=subprocess.DEVNULL)


def test_every_link_leads_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
