"""The checkpoint directory: made once, bound to a sink, read by who is dead and who is alive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_resume.checkpoint.backend import new_run_id
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local import backend as directory_module
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lease import Lease, live_runs
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.checkpoint.location import Location
from ray_resume.core.digests import source_digest
from ray_resume.core.records import Record, State
from ray_resume.errors import CheckpointError


def done(source_id: str, sequence: int = 1, run_id: str = "run") -> Record:
    return Record(source_id, State.COMPLETED, sequence, run_id)


class Writing:
    """A run at work in this process on one source: it holds a lease and has committed."""

    def __init__(self, directory: Path, run_id: str, source_id: str) -> None:
        claim = Claim(frozenset([source_digest(source_id)]))
        self.lease = Lease.acquire(directory, Owner.here(run_id), claim, wait_s=0)
        self.writer = WriterFile.create(directory, run_id, {"sources_total": 1})
        self.writer.commit([done(source_id, run_id=run_id)])

    def end(self) -> None:
        self.writer.close()
        self.lease.end(wait_s=0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> LocalBackend:
    made = LocalBackend(tmp_path / "ckpt")
    made.ensure()
    return made


def test_run_ids_are_what_file_names_are_made_of() -> None:
    ids = {new_run_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(i) == 12 and set(i) <= set("0123456789abcdef") for i in ids)


# Making one.


def test_creating_the_object_touches_nothing(tmp_path: Path) -> None:
    LocalBackend(tmp_path / "ckpt")
    assert not list(tmp_path.iterdir())


def test_ensure_makes_it_once(tmp_path: Path) -> None:
    made = LocalBackend(tmp_path / "a" / "b" / "ckpt")
    identity = made.ensure()
    assert len(identity) == 8
    assert set(identity) <= set("0123456789abcdef")
    content = (made.path / "checkpoint.json").read_bytes()
    assert made.ensure() == LocalBackend(made.path).ensure() == made.identity() == identity
    assert (made.path / "checkpoint.json").read_bytes() == content
    assert sorted(os.listdir(made.path)) == ["checkpoint.json", "lock"]
    assert made.sink() is None


RACE = """
import os, sys
from ray_resume.checkpoint.local.backend import LocalBackend

start, go = os.pipe()
children = []
for _ in range(8):
    pid = os.fork()
    if not pid:
        os.close(go)
        os.read(start, 1)  # Ends when the parent closes its end: all start at once.
        os.write(1, (LocalBackend(sys.argv[1]).ensure() + "\\n").encode())
        os._exit(0)
    children.append(pid)
os.close(go)
sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))
"""


@pytest.mark.parametrize("attempt", range(3))
def test_eight_processes_make_one_checkpoint(tmp_path: Path, attempt: int) -> None:
    command = [sys.executable, "-c", RACE, str(tmp_path / "deep" / "ckpt")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    identities = result.stdout.split()
    assert len(identities) == 8
    assert len(set(identities)) == 1


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "ckpt").touch()
    with pytest.raises(CheckpointError, match="is a file, and a directory is needed"):
        LocalBackend(tmp_path / "ckpt").ensure()
    with pytest.raises(CheckpointError, match="cannot be made"):
        LocalBackend(tmp_path / "ckpt" / "below").ensure()


def test_a_place_that_cannot_be_written_to() -> None:
    with pytest.raises(CheckpointError, match="/proc/none"):
        LocalBackend("/proc/none/ckpt").ensure()


def test_a_missing_one_is_named(tmp_path: Path) -> None:
    missing = LocalBackend(tmp_path / "ckpt")
    for look in (missing.identity, missing.sink, missing.snapshot):
        with pytest.raises(CheckpointError, match=r"There is no checkpoint at .*/ckpt"):
            look()
    with pytest.raises(CheckpointError, match="/ckpt"):
        missing.committed_by_dead_runs("run")
    assert not (tmp_path / "ckpt").exists()


# Paths.


@pytest.mark.parametrize(
    "spelling",
    ["{path}/ckpt", "file://{path}/ckpt", "file://localhost{path}/c%6bpt", "file:{path}/ckpt"],
)
def test_local_paths_and_file_uris_are_the_same_place(tmp_path: Path, spelling: str) -> None:
    assert LocalBackend(spelling.format(path=tmp_path)).path == tmp_path / "ckpt"


def test_relative_and_home_paths_are_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert LocalBackend("a/../ckpt").path == tmp_path / "ckpt"
    assert LocalBackend("~/ckpt").path == tmp_path / "home" / "ckpt"
    assert LocalBackend("a:/b").path == tmp_path / "a:" / "b"
    assert LocalBackend("date=2020:01/b").path == tmp_path / "date=2020:01" / "b"


@pytest.mark.parametrize("path", ["hdfs://no.such.host/ckpt", "file://host/ckpt", "what://b/c"])
def test_places_that_cannot_be_opened_are_told(path: str) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be opened: .*pyarrow knows"):
        Location(path).open()


def test_secrets_are_not_told() -> None:
    with pytest.raises(
        CheckpointError, match=r"The checkpoint what://me@host/c\?sas_token=\*\*\* c"
    ):
        Location("what://me:secret@host/c?sas_token=secret").open()


# Identity and sink.


def test_binding_keeps_the_identity_and_can_be_changed(checkpoint: LocalBackend) -> None:
    identity = checkpoint.identity()
    for sink in ("file:///out", "s3://bucket/öut"):
        checkpoint.bind(sink, "")
        assert LocalBackend(checkpoint.path).sink() == sink
    assert checkpoint.ensure() == identity


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"id": "x"}', b'{"id": "x", "format": 1}', b"\xff\xfe"]
)
def test_a_damaged_identity_is_one_clear_error(checkpoint: LocalBackend, content: bytes) -> None:
    (checkpoint.path / "checkpoint.json").write_bytes(content)
    for use in (checkpoint.ensure, checkpoint.sink, checkpoint.snapshot):
        with pytest.raises(CheckpointError, match=r"checkpoint\.json cannot be read.*Restore it"):
            use()


def test_a_newer_format_is_refused(checkpoint: LocalBackend) -> None:
    path = checkpoint.path / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 5}))
    with pytest.raises(CheckpointError, match=r"format 5.*Upgrade ray_resume"):
        checkpoint.ensure()


def test_a_checkpoint_from_before_the_first_release_is_refused(checkpoint: LocalBackend) -> None:
    """Its sink and its ranks would be overlooked: they stood in other files."""
    path = checkpoint.path / "checkpoint.json"
    path.write_text(json.dumps({"id": "0" * 8, "sink": "/out", "format": 1}))
    with pytest.raises(CheckpointError, match=r"format 1.*before the first release.*start over"):
        checkpoint.sink()


# Contents.


def test_an_empty_checkpoint_has_nothing(checkpoint: LocalBackend) -> None:
    for contents in (checkpoint.committed_by_dead_runs("run"), checkpoint.snapshot()):
        assert (len(contents.snapshot), contents.headers, contents.live) == (0, {}, {})


def test_settled_leaves_live_runs_out_and_everything_shows_them(
    checkpoint: LocalBackend,
) -> None:
    Writing(checkpoint.path, "dead", "a").end()
    live = Writing(checkpoint.path, "live", "b")

    settled = checkpoint.committed_by_dead_runs("other")
    assert {record.source_id for record in settled.snapshot} == {"a"}
    assert (set(settled.headers), set(settled.live)) == ({"dead"}, {"live"})
    assert settled.dead_runs == {"dead"}

    everything = checkpoint.snapshot()
    assert {record.source_id for record in everything.snapshot} == {"a", "b"}
    assert (set(everything.headers), set(everything.live)) == ({"dead", "live"}, {"live"})
    assert everything.dead_runs == {"dead"}

    # Its own ledger is closed before a run asks for what it did itself.
    live.writer.close()
    own = checkpoint.committed_by_dead_runs("live")
    assert {record.source_id for record in own.snapshot} == {"a", "b"}
    assert own.live == {}
    assert own.dead_runs == {"dead", "live"}
    live.end()
    assert checkpoint.committed_by_dead_runs("other").dead_runs == {"dead", "live"}


def test_a_neighbour_that_ends_after_the_note_was_alive(
    checkpoint: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its files, committed after the list was read, would pass for left-overs."""
    neighbour = Writing(checkpoint.path, "neighbour", "a")
    note = live_runs

    def note_then_end(path: Path) -> dict[str, Owner]:
        live = note(path)
        neighbour.writer.commit([done("late", run_id="neighbour")])
        neighbour.writer.close()
        neighbour.lease.path.unlink()
        neighbour.lease.release()
        return live

    monkeypatch.setattr(directory_module, "live_runs", note_then_end)
    contents = checkpoint.committed_by_dead_runs("other")
    assert (len(contents.snapshot), contents.dead_runs) == (0, frozenset())
    assert set(contents.live) == {"neighbour"}


def test_an_unreadable_writer_file_is_never_skipped(checkpoint: LocalBackend) -> None:
    Writing(checkpoint.path, "dead", "a").end()
    (checkpoint.path / "broken.mdb").write_bytes(b"x" * 10_000)
    for look in (checkpoint.snapshot, lambda: checkpoint.committed_by_dead_runs("other")):
        with pytest.raises(CheckpointError, match=r"broken\.mdb"):
            look()


def test_what_a_killed_process_left_half_made_is_not_read(checkpoint: LocalBackend) -> None:
    (checkpoint.path / ".half.mdb.new").write_bytes(b"x")
    (checkpoint.path / ".half.mdb.new-lock").write_bytes(b"x")
    (checkpoint.path / ".sink.json").write_bytes(b"x")
    (checkpoint.path / "dead.mdb-lock").write_bytes(b"x")
    assert checkpoint.snapshot().headers == {}
    assert checkpoint.committed_by_dead_runs("other").headers == {}
    checkpoint.bind("file:///out", "")
    assert checkpoint.sink() == "file:///out"


def test_two_first_runs_cannot_bind_it_to_two_sinks(tmp_path: Path) -> None:
    """Both have seen it unbound; the second to bind is told, as long as the first is alive."""
    checkpoint = LocalBackend(tmp_path)
    checkpoint.ensure()
    claims = [Claim(frozenset({bytes([i]) * 16})) for i in range(2)]
    leases = [Lease.acquire(tmp_path, Owner.here(f"run{i}"), claims[i], wait_s=0) for i in range(2)]
    checkpoint.bind("/out/a", "run0")
    with pytest.raises(CheckpointError, match="/out/a by another run"):
        checkpoint.bind("/out/b", "run1")
    checkpoint.bind("/out/a", "run1")
    leases[0].end(wait_s=0)
    checkpoint.bind("/out/b", "run1")
    assert checkpoint.sink() == "/out/b"
    leases[1].end(wait_s=0)


def test_files_of_dead_runs_are_read_once_and_a_run_s_own_file_not_at_all(
    checkpoint: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    Writing(checkpoint.path, "dead", "a").end()
    alive = Writing(checkpoint.path, "neighbour", "b")
    assert set(checkpoint.committed_by_dead_runs("own").headers) == {"dead"}
    own = Writing(checkpoint.path, "own", "c")
    contents = own.writer.contents()
    own.writer.close()
    (dead,) = checkpoint.path.glob("dead.mdb")
    with monkeypatch.context() as patch:
        # Another process is needed for each read.
        patch.setattr(sys, "executable", "/nowhere")
        now = checkpoint.committed_by_dead_runs("own", contents)
        assert {record.source_id for record in now.snapshot} == {"a", "c"}
        assert now.headers["own"]["sources_total"] == 1
        alive.end()
        with pytest.raises(FileNotFoundError):
            checkpoint.committed_by_dead_runs("own", contents)
    now = checkpoint.committed_by_dead_runs("own")
    assert {record.source_id for record in now.snapshot} == {"a", "b", "c"}
    # A file that was restored in the meantime is another one.
    dead.unlink()
    Writing(checkpoint.path, "dead", "d").end()
    now = checkpoint.committed_by_dead_runs("own", contents)
    assert {record.source_id for record in now.snapshot} == {"b", "c", "d"}
    own.lease.end(wait_s=0)
