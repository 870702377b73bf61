"""Checkpoints with hostile content: no code of theirs runs, and no terminal obeys them."""

from __future__ import annotations

import ast
import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_architecture
from hostile_names import HOSTILE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_store import put, put_block
from snapshots import whole_files

from ray_resume import Checkpoint, CheckpointError
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lmdb_file import FORMAT_VERSION, WriterFile
from ray_resume.cli import main
from ray_resume.core.records import Record, State, encode

pytestmark = pytest.mark.long

RUN = "aaaaaaaaaaaa"

# --- What reads a checkpoint runs nothing of it ---


RUNS_CODE = {"cloudpickle", "dill", "imp", "importlib", "joblib", "pickle", "runpy", "shelve"}
PYARROW = {f"pyarrow.{name}" for name in ("csv", "feather", "orc", "parquet")}
CALLS_CODE = {"__import__", "compile", "eval", "exec"}


def readers() -> set[str]:
    """All modules that the looking at a checkpoint loads; `__init__` loads names of its table."""
    found, new = (
        set[str](),
        {
            "cli",
            "checkpoint.checkpoint",
            "checkpoint.local.backend",
            "core.resume_plan",
        },
    )
    while new:
        found |= new
        new = set[str]().union(*map(test_architecture.ours, new)) - found - {"__init__"}
    return found


def test_nothing_in_a_checkpoint_is_unpickled_or_evaluated() -> None:
    modules = readers()
    local = {f"checkpoint.local.{name}" for name in ("lmdb_file", "reader", "lease")}
    assert {*local, "core.records", "checkpoint.check", "checkpoint.compaction"} <= modules
    for module in modules:
        roots = {name.partition(".")[0] for name in test_architecture.imports_of(module)}
        tree = ast.parse(test_architecture.path_of(module).read_text())
        if "importlib" in roots:
            # Output files are read by pyarrow's modules, which take long to load.
            assert imported_by_name(tree) <= PYARROW, module
            roots.discard("importlib")
        assert not roots & RUNS_CODE, module
        # Between two of our own processes, and never code objects.
        assert module == "checkpoint.local.reader" or "marshal" not in roots
        called = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & CALLS_CODE, module


def imported_by_name(tree: ast.AST) -> set[str]:
    """Return what is given to `importlib.import_module`: constants, or the source of others."""
    return {
        ast.literal_eval(node.args[0])
        if isinstance(node.args[0], ast.Constant)
        else ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "importlib"
    }


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    directory = LocalBackend(tmp_path / "ckpt")
    directory.ensure()
    WriterFile.create(directory.path, RUN, {"sources_total": 3}).close()
    return directory.path


def looks(path: Path) -> list[Callable[[], object]]:
    checkpoint = Checkpoint(path)
    return [
        checkpoint.status,
        checkpoint.files,
        checkpoint.dead_letters,
        lambda: list(checkpoint.sources()),
        lambda: str(checkpoint.check()),
        checkpoint.compact,
        lambda: checkpoint.reset(state="all"),
    ]


def refusals(path: Path, calls: list[Callable[[], object]]) -> list[str]:
    errors = []
    for call in calls:
        try:
            call()
        except CheckpointError as error:
            errors.append(str(error))
    return errors


@pytest.mark.parametrize("place", ["value", "head and value", "header", "identity", "lease"])
def test_a_pickle_in_any_place_is_not_opened(path: Path, tmp_path: Path, place: str) -> None:
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    pickle.loads(trap)
    sprung.unlink()
    if place == "value":
        put_block(path / f"{RUN}.mdb", trap)
    elif place == "head and value":
        rest = struct.pack("<?Q", False, len(trap)) + trap
        put_block(path / f"{RUN}.mdb", struct.pack("<I", zlib.crc32(rest)) + rest)
    elif place == "header":
        put(path / f"{RUN}.mdb", b"header", trap)
    elif place == "identity":
        (path / "checkpoint.json").write_bytes(trap)
    else:
        (path / "bbbbbbbbbbbb.lease").write_bytes(trap)
    errors = refusals(path, looks(path))
    assert len(errors) == 0 if place == "lease" else len(errors) >= 5
    assert all(str(path) in error for error in errors)
    assert not sprung.exists()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
headers = values | st.fixed_dictionaries(
    {"format": st.just(FORMAT_VERSION)},
    optional={"sources_total": values, "merged": values, "run_id": values, "signature": values},
)
slowly = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.extended
@slowly
@given(headers)
def test_any_header_is_read_or_refused(path: Path, header: object) -> None:
    put(path / f"{RUN}.mdb", b"header", json.dumps(header).encode())
    assert all(f"{RUN}.mdb" in error for error in refusals(path, looks(path)[:5]))


@given(
    st.binary()
    | values.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries({"format": st.just(2), "id": values, "layout": values}).map(
        lambda value: json.dumps(value).encode()
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_identity_is_read_or_refused(path: Path, content: bytes) -> None:
    (path / "checkpoint.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="checkpoint"):
        LocalBackend(path).identity()


def test_an_id_cannot_lead_out_of_the_output_folder(path: Path) -> None:
    for identity in ("../../../etc", "0123456/", "0123456\n", ["01234567"], 1234567):
        content = {"format": 2, "id": identity, "layout": None}
        (path / "checkpoint.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"checkpoint\.json cannot be read"):
            LocalBackend(path).ensure()


@pytest.mark.extended
@slowly
@given(
    st.binary()
    | st.fixed_dictionaries(
        {
            "run_id": values,
            "host": st.text() | values,
            "pid": st.integers() | values,
            "started_at": st.floats() | values,
        }
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_lease_is_somebodys(path: Path, content: bytes) -> None:
    (path / "bbbbbbbbbbbb.lease").write_bytes(content)
    (run,) = Checkpoint(path).status().runs
    assert not run["alive"]
    assert "Did not end by itself" in str(Checkpoint(path).check())
    assert main(["status", str(path)]) == 0


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["status", "--json"],
        ["sources"],
        ["sources", "--json"],
        ["files"],
        ["files", "--json"],
        ["check"],
        ["check", "--json"],
        ["reset", "--source", "\x1bnone"],
    ],
)
def test_a_terminal_gets_no_control_characters(
    path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = []
    for number, name in enumerate(HOSTILE):
        kind = (State.COMPLETED, State.FAILED, State.QUARANTINED)[number % 3]
        file = name.replace("\n", "") if arguments == ["files"] else name
        record = Record(
            name,
            kind,
            1 + number,
            RUN,
            1,
            whole_files(file),
            f"boom\n{name}",
            1,
            completed_at=1e300,
        )
        records.append(record)
    put_block(path / f"{RUN}.mdb", next(encode(records)))
    LocalBackend(path).bind(str(path.parent / "out\x1b[31m"), RUN)
    owner = {"run_id": "\x1b[31m", "host": "\x1b[31m\n", "pid": 1, "started_at": 1e300}
    (path / "\x1b[31m.lease").write_text(json.dumps(owner))
    output = Terminal(io.BytesIO(), encoding="utf-8", write_through=True)
    monkeypatch.setattr("sys.stdout", output)
    main([arguments[0], str(path), *arguments[1:]])
    shown = output.buffer.getvalue().decode() + capsys.readouterr().err  # type: ignore[attr-defined]
    assert shown
    control = {c for c in shown if not c.isprintable()}
    assert control <= {"\n", "\t"}
