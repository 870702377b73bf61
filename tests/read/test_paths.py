"""Where the files of a read are: as plain Ray Data finds them, and over HTTP from a real server."""

from __future__ import annotations

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem as FsspecLocal
from fsspec.implementations.zip import ZipFileSystem
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from ray.data.datasource.file_meta_provider import DefaultFileMetadataProvider
from ray.data.datasource.path_util import _resolve_paths_and_filesystem

from ray_resume import ResumeError, resumable, resumable_read, resumable_write
from ray_resume.core.records import Fingerprint
from ray_resume.filesystems import _changed_ns
from ray_resume.read.listing import has_changed, list_files
from ray_resume.read.paths import id_of_url, resolve
from ray_resume.testing import rows_of

# Names that some rule for URIs, for globs or for query strings could take for something else.
NAMES = [
    "a.txt",
    "b c.txt",
    "p%20q.txt",
    "h#x.txt",
    "q?y.txt",
    "ü.txt",
    "semi;colon.txt",
    "star*.txt",
    "[x].txt",
    "am&p=1.txt",
    "co:lon.txt",
    "at@x.txt",
    "UP.TXT",
    "sub dir/d.txt",
    "h#sh/%41?.txt",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in NAMES:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"line of {name}\n")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as packed:
        packed.writestr("a.txt", "a\n")
        packed.writestr("s/b.txt", "b\n")
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    memory = fsspec.filesystem("memory")
    memory.pipe("/m/a.txt", b"a\n")
    return tmp_path


def plain_listing(paths: Any, filesystem: Any) -> list[str]:
    resolved, found = _resolve_paths_and_filesystem(paths, filesystem)
    listing: Any = DefaultFileMetadataProvider().expand_paths(resolved, found)
    return sorted(path for path, _ in listing)


def our_listing(paths: Any, filesystem: Any) -> list[str]:
    found, resolved = resolve(paths, filesystem)
    sources = list_files(found, resolved, extensions=None, keep=None, ignore_missing=False)
    return sorted(source.item for source in sources)


def found_by(listing: Any, paths: Any, filesystem: Any) -> Any:
    try:
        return listing(paths, filesystem)
    except (FileNotFoundError, ValueError, TypeError) as error:
        # A file that is not there is a FileNotFoundError; what is no path at all is the other.
        return FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError


def forms(folder: Path) -> Iterator[tuple[Any, Any]]:
    """Yield paths and filesystems that users may give."""
    inside = folder / "in"
    for name in [*NAMES, "", "/", "nothing.txt", "*.txt", "[ab].txt", "{a,b}.txt", "a.txt/"]:
        yield f"{inside}/{name}", None
        yield f"file://{inside}/{name}", None
        yield f"local://{inside}/{name}", None
        if not name.endswith("/"):
            yield f"{inside}/{name}", LocalFileSystem()
            yield f"{inside}/{name}", FsspecLocal()
    yield from ((path, None) for path in (inside, [inside / "a.txt"], "in/a.txt", "./in/../in"))
    yield from ((path, None) for path in ("~/in/a.txt", f"{inside}//a.txt", f"{inside}///"))
    yield f"file://{inside}/b%20c.txt", None
    yield [f"{inside}/a.txt", f"file://{inside}/ü.txt", str(inside / "sub dir")], None
    yield f"file://{inside}/a.txt", LocalFileSystem()
    yield "~/in/a.txt", LocalFileSystem()
    yield "in", DirFileSystem(str(folder), FsspecLocal())
    yield "a.txt", ZipFileSystem(f"{folder}/z.zip")
    yield "s", ZipFileSystem(f"{folder}/z.zip")
    yield from ((path, fsspec.filesystem("memory")) for path in ("/m", "/m/a.txt"))
    strange: list[Any] = ["", [], None, 5, b"/tmp", ("in",), iter(["in"])]
    yield from ((path, None) for path in strange)
    yield str(inside), "file"


@pytest.mark.filterwarnings("ignore:.local")
def test_paths_of_all_forms_are_those_of_plain(folder: Path) -> None:
    different = []
    for paths, filesystem in forms(folder):
        expected = found_by(plain_listing, paths, filesystem)
        if isinstance(expected, list):
            # Each file has one path, from the root: it is the source's id.
            relative = folder if not filesystem or isinstance(filesystem, LocalFileSystem) else ""
            expected = [os.path.normpath(relative / Path(path).expanduser()) for path in expected]
        got = found_by(our_listing, paths, filesystem)
        if isinstance(got, list) and filesystem is not None:
            got = [str(Path(path)) for path in got]
        if got != (sorted(expected) if isinstance(expected, list) else expected):
            different.append((paths, filesystem, expected, got))
    assert not different, different[:2]


def test_what_plain_passes_over_is_refused(folder: Path) -> None:
    """Plain Ray Data logs that it cannot resolve a path, and reads the others."""
    for strange in ("foo://x/a.txt", "ftp://x/a.txt", "memory://m/a.txt"):
        with pytest.raises(ResumeError, match="its rows would be missing"):
            resolve([f"{folder}/in/a.txt", strange], None)
    with pytest.raises(ValueError, match="local://"):
        resolve([f"{folder}/in/a.txt", f"local://{folder}/in/ü.txt"], None)


def test_a_part_of_a_filesystem_is_named_from_its_root(folder: Path) -> None:
    part = SubTreeFileSystem(str(folder), LocalFileSystem())
    assert our_listing("in/a.txt", part) == our_listing("/in/a.txt", part) == [f"{folder}/in/a.txt"]


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({}, None),
        ({"mtime": 1.5}, 1_500_000_000),
        ({"mtime": None, "ETag": None}, None),
        ({"LastModified": datetime(1970, 1, 1, 0, 0, 1, tzinfo=timezone.utc)}, 1_000_000_000),
        ({"created": datetime(1970, 1, 1, 0, 0, 1)}, 1_000_000_000),
        ({"updated": "1970-01-01T00:00:01.000002Z"}, 1_000_002_000),
        ({"Last-Modified": "Thu, 01 Jan 1970 00:00:02 GMT", "ETag": "x"}, 2_000_000_000),
    ],
)
def test_when_a_file_changed_is_known_under_any_name(
    info: dict[str, Any], expected: int | None
) -> None:
    assert _changed_ns(info) == expected


def test_a_stamp_serves_as_a_time() -> None:
    one, other = _changed_ns({"ETag": '"a"'}), _changed_ns({"ETag": '"b"', "Last-Modified": "?"})
    assert one is not None
    assert other is not None
    assert one != other
    assert 0 <= min(one, other) <= max(one, other) < 2**63


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h/a.csv", "http://h/a.csv"),
        ("https://u:p@h:8/a%20b.csv?v=1&sv=2#x", "https://h:8/a%20b.csv?v=1&sv=2#x"),
        ("https://h/k?X-Amz-Date=1&v=7&X-Amz-Signature=s", "https://h/k?v=7"),
        ("https://h/k?sv=1&st=2&se=3&sr=b&sp=r&sig=s", "https://h/k"),
        ("https://h/k?Expires=1&Signature=s&Key-Pair-Id=k", "https://h/k"),
        ("https://h/k?token=t", "https://h/k?token=t"),
    ],
)
def test_the_id_of_a_url_has_no_secret_that_changes(url: str, expected: str) -> None:
    assert id_of_url(url) == expected


class Web(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, also parts of files. ``stamp`` is what it tells of their changes."""

    stamp: ClassVar[str | None] = "Last-Modified"

    def log_message(self, *_: Any) -> None:
        pass

    def send_header(self, keyword: str, value: str) -> None:
        if keyword == "Last-Modified" and self.stamp != keyword:
            if self.stamp is None:
                return
            keyword, value = "ETag", f'"{value}"'
        super().send_header(keyword, value)

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(data[first : last + 1])


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server of HTTP on loopback, and the folder that it serves."""
    pytest.importorskip("aiohttp", reason="fsspec reads HTTP with it")
    folder = tmp_path / "web"
    folder.mkdir()
    handler = functools.partial(Web, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


@pytest.mark.long
@pytest.mark.parametrize("stamp", ["Last-Modified", "ETag", None])
def test_changes_are_seen_as_far_as_a_server_tells_of_them(
    web: tuple[str, Path], stamp: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Web, "stamp", stamp)
    url, folder = web
    (folder / "a.txt").write_text("one\n")
    filesystem, paths = resolve(f"{url}/a.txt?v=1", None)

    def look() -> Fingerprint:
        listed = list_files(filesystem, paths, extensions=["txt"], keep=None, ignore_missing=False)
        return listed[0].fingerprint

    before = look()
    assert before.size == 4
    assert (before.mtime_ns is None) == (stamp is None)
    assert not has_changed(filesystem, paths[0], before)
    (folder / "a.txt").write_text("two\n")
    os.utime(folder / "a.txt", (1, 1))
    assert (look() != before) == (stamp is not None) == has_changed(filesystem, paths[0], before)
    (folder / "a.txt").write_text("longer\n")
    assert look() != before
    assert has_changed(filesystem, paths[0], before)
    (folder / "a.txt").unlink()
    assert has_changed(filesystem, paths[0], before)
    with pytest.raises(FileNotFoundError):
        look()
    with pytest.raises(ValueError, match="different filesystems"):
        resolve([str(folder), url], None)


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_files_over_http_are_read_resumed_and_read_again_when_they_change(
    web: tuple[str, Path], tmp_path: Path
) -> None:
    from fsspec.implementations.http import HTTPFileSystem

    url, folder = web
    for number in range(3):
        table = pa.table({"id": [10 * number + row for row in range(4)]})
        pq.write_table(table, folder / f"{number} x.parquet", row_group_size=2)
    sign = "X-Amz-Date={0}&X-Amz-Signature={0}"
    options: dict[str, Any] = {"include_paths": True}

    def run(paths: list[str], **more: Any) -> Any:
        ds = resumable_read(
            ray.data.read_parquet, paths, checkpoint=tmp_path / "ckpt", **options, **more
        )
        return resumable_write(ds.map_batches(resumable(lambda batch: batch)), tmp_path / "out")

    def rows() -> Any:
        return sorted(
            (row["id"], row["path"].partition("?")[0]) for row in rows_of(tmp_path / "ckpt")
        )

    paths = [f"{url}/{number}%20x.parquet?{sign.format(1)}" for number in range(3)]
    assert run(paths[:2]).sources_completed == 2
    plain = ray.data.read_parquet(paths[:2], **options).take_all()
    assert rows() == sorted((row["id"], row["path"].partition("?")[0]) for row in plain)
    pq.write_table(pa.table({"id": [1, 2, 3]}), folder / "1 x.parquet")
    # Signed again, they are the same files.
    paths = [path.replace("=1", "=2") for path in paths]
    summary = run(paths, filesystem=HTTPFileSystem())
    assert (summary.sources_completed, summary.sources_skipped) == (2, 1)
    assert [row for row, _ in rows()] == sorted([0, 1, 2, 3, 1, 2, 3, 20, 21, 22, 23])


@pytest.mark.long
def test_threads_resolve_paths_where_http_cannot_be_imported() -> None:
    script = (
        "import sys, threading\n"
        "sys.modules['aiohttp'] = None  # not installed\n"
        "from ray_resume.read.paths import resolve\n"
        "import pyarrow.fs\n"
        "start, failed = threading.Barrier(16), []\n"
        "def look():\n"
        "    start.wait()\n"
        "    try:\n"
        "        for _ in range(10): resolve('s3://bucket/key?region=x', None)\n"
        "    except BaseException as error:\n"
        "        failed.append(repr(error))\n"
        "threads = [threading.Thread(target=look) for _ in range(16)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print(failed, 'fsspec.implementations.http' in sys.modules)\n"
        "try: resolve('http://127.0.0.1/a.csv', None)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    threads, http, *_ = result.stdout.splitlines()
    assert threads == "[] False"
    # Ray asks for fsspec, which is there.
    assert http.startswith("ResumeError http://127.0.0.1/a.csv cannot be resolved")
    assert http.endswith("pip install aiohttp.")
