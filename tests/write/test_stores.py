"""Output on a storage that fails for moments: it is tried again, as plain Ray Data does."""

from __future__ import annotations

import errno
import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq
import pytest
import ray
from buckets import S3
from pyarrow.fs import LocalFileSystem

from ray_resume import resumable, resumable_read, resumable_write
from ray_resume.write.folder import Folder, fault_of

pytestmark = pytest.mark.extended


class Gate:
    """Forwards a port to a server; while it is shut, nobody is there."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._socket = self._listening(0)
        self.port: int = self._socket.getsockname()[1]
        self._connections: list[socket.socket] = []
        self._serve()

    def shut(self) -> None:
        # Closing alone does not wake up who accepts.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in self._connections:
            connection.close()
        self._connections = []

    def open(self) -> None:
        self._socket = self._listening(self.port)
        self._serve()

    def _listening(self, port: int) -> socket.socket:
        found = socket.socket()
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(("127.0.0.1", port))
        found.listen(64)
        return found

    def _serve(self) -> None:
        threading.Thread(target=self._accept, args=(self._socket,), daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                near = listening.accept()[0]
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._server_port))
            self._connections += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=(one, other), daemon=True).start()


def _pump(one: socket.socket, other: socket.socket) -> None:
    try:
        while data := one.recv(1 << 16):
            other.sendall(data)
    except OSError:
        pass
    finally:
        for end in (one, other):
            end.close()


@pytest.fixture
def gate(s3: S3) -> Iterator[Gate]:
    gate = Gate(s3.port)
    yield gate
    gate.shut()


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_a_storage_that_is_away_for_ten_seconds(
    s3: S3, gate: Gate, source: Path, tmp_path: Path
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"

    @resumable
    def wait(batch: Any) -> Any:
        before.touch()
        deadline = time.monotonic() + 60
        while not after.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return batch

    def be_away() -> None:
        deadline = time.monotonic() + 60
        while not before.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        gate.shut()
        after.touch()
        time.sleep(10)
        gate.open()

    thread = threading.Thread(target=be_away)
    thread.start()
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    out = S3(gate.port, s3.bucket).uri("away")
    summary = resumable_write(ds.map_batches(wait), out)
    thread.join()
    assert (summary.sources_completed, summary.rows_written) == (7, 600)
    files = [s3.filesystem.open_input_file(s3.key(f"away/{name}")) for name in s3.names("away")]
    ids = [i for file in files for i in pq.ParquetFile(file).read(["id"])["id"].to_pylist()]
    assert sorted(ids) == list(range(600))


class Moody:
    """A filesystem that fails some times in a row, by the same error."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0
        self.type_name = "s3"

    def open_output_stream(self, path: str, compression: str | None = "detect") -> IO[bytes]:
        assert compression is None, "what is written is compressed already, if at all"
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return io.BytesIO()


AWAY = OSError("When writing: AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7")


@pytest.mark.parametrize(
    ("error", "patterns", "times", "calls"),
    [
        (AWAY, ["AWS Error NETWORK_CONNECTION"], 9, 10),
        (AWAY, ["NETWORK_.*curlCode: [0-9]"], 2, 3),
        (AWAY, ["AWS Error NETWORK_CONNECTION"], 10, 10),
        (AWAY, ["SLOW_DOWN", "(not a pattern"], 1, 1),
        (PermissionError(errno.EACCES, "no"), ["AWS Error"], 1, 1),
    ],
)
def test_what_is_tried_again_and_how_often(
    error: Exception,
    patterns: list[str],
    times: int,
    calls: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    filesystem: Any = Moody(error, times)
    folder = Folder(filesystem, "bucket/out", "s3://bucket/out", tuple(patterns))

    def write(file: IO[bytes]) -> None:
        file.write(b"x")

    if times >= calls:
        with pytest.raises(type(error)):
            folder.write_file("name", write)
    else:
        folder.write_file("name", write)
    assert filesystem.calls == calls
    assert len(pauses) == calls - 1
    # As in plain Ray Data: from a second on, doubled up to 32 seconds, and a fifth of chance.
    for attempt, pause in enumerate(pauses):
        assert 0.8 <= pause / min(2**attempt, 32) <= 1.2


def test_messages_say_which_kind_of_fault_it_is(tmp_path: Path) -> None:
    assert fault_of(OSError(errno.ENOSPC, "No space left on device"))[1] == "Free space"
    assert "not allowed" in fault_of(PermissionError(errno.EACCES, "Permission denied"))[0]
    assert "away" in fault_of(AWAY)[0]
    folder = Folder(LocalFileSystem(), str(tmp_path / "file" / "out"), "out")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory") as caught:
        folder.create()
    assert "refuses" in fault_of(caught.value)[0]
