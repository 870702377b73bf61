"""Hostile content: in checkpoints, in ids, in names, from UDFs."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import test_architecture
from conftest import ids_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_store import put, put_block
from snapshots import whole_files
from test_failures import Desk, batch_of, x_of

from ray_resume import (
    Checkpoint,
    CheckpointError,
    ResumeError,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lmdb_file import FORMAT_VERSION, WriterFile
from ray_resume.cli import main
from ray_resume.core.records import Record, State, encode
from ray_resume.core.tokens import SOURCE_COLUMN, TOKEN_COLUMN
from ray_resume.raydata import blocks, user_batches
from ray_resume.udf.stage import instrument

pytestmark = pytest.mark.long

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any

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


# --- What the command shows ---

HOSTILE = [
    "line\nbreak",
    "\x1b[2J\x1b]0;title\x07red",
    "\x9b31m\x85\u2028\u202e",
    "tab\tand\rreturn",
    "\udcff\ud800",
    "nul\0",
    "del\x7f",
    "x" * 10_000,
    "",
    " ",
    "naïve ☃ 𝄞",
]


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


# --- Ids and names in a pipeline ---


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
def test_ids_of_any_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, out = tmp_path / "ckpt", tmp_path / "out"

    def load(key: str) -> pa.Table:
        return pa.table({"id": [HOSTILE.index(key)] * 3})

    @resumable(on_error="dead_letter")
    def some(batch: Batch) -> Batch:
        if batch["id"][0] % 2:
            raise ValueError(HOSTILE[batch["id"][0]])
        return batch

    def job() -> Any:
        ds = resumable_read(load, keys=HOSTILE, checkpoint=checkpoint)
        return resumable_write(ds.map_batches(some), out)

    assert job().sources_completed == len(HOSTILE)
    assert {source.source_id for source in Checkpoint(checkpoint).sources()} == set(HOSTILE)
    assert ids_in(out) == sorted(3 * list(range(0, len(HOSTILE), 2)))
    assert ids_in(checkpoint / "dead-letters") == sorted(3 * list(range(1, len(HOSTILE), 2)))
    assert job().sources_skipped == len(HOSTILE)
    assert Checkpoint(checkpoint).reset(HOSTILE[:5]) == 5
    summary = job()
    assert (summary.sources_completed, summary.sources_skipped) == (5, len(HOSTILE) - 5)
    assert ids_in(out) == sorted(3 * list(range(0, len(HOSTILE), 2)))
    report = Checkpoint(checkpoint).check()
    assert (report.ok, report.notes) == (True, ())
    assert main(["sources", str(checkpoint)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(HOSTILE)


NAMES = [
    "plain",
    "a b",
    "per%20cent",
    "hash#rg0",
    "what?x=1",
    "star*[a]",
    "\x1b[31mred",
    "del\x7f\x01",
    "naïve ☃",
    "back\\slash",
    "quote'\"",
    "ß" * 100,
]


@pytest.mark.usefixtures("cluster")
def test_files_of_any_name(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number, name in enumerate(NAMES):
        pq.write_table(pa.table({"id": [number]}), str(source / f"{name}.parquet"))

    def job() -> Any:
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
        return resumable_write(ds, out)

    assert job().sources_completed == len(NAMES)
    assert job().sources_skipped == len(NAMES)
    assert ids_in(out) == list(range(len(NAMES)))
    assert Checkpoint(tmp_path / "ckpt").check().ok


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("name", [b"tab\t", b"line\nbreak", b"return\r", b"\xff\xfe"])
def test_files_whose_name_ray_cannot_open_are_refused(tmp_path: Path, name: bytes) -> None:
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(pa.table({"id": [1]}), str(source / "good.parquet"))
    os.link(source / "good.parquet", os.fsencode(source) + b"/" + name + b".parquet")
    with pytest.raises(ResumeError, match="Rename it") as caught:
        resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    assert str(caught.value).isprintable()


@pytest.mark.usefixtures("cluster")
def test_somebody_elses_file_of_any_name_stays(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / os.fsdecode(b"\xff")).write_text("mine")
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="did not make"):
        resumable_write(ds, out)
    assert resumable_write(ds, out, append=True).sources_completed == 7
    assert (out / os.fsdecode(b"\xff")).read_text() == "mine"


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("name", [SOURCE_COLUMN, TOKEN_COLUMN])
def test_input_with_a_column_of_ours_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": [1], name: [1]}), str(tmp_path / "in" / "a.parquet"))
    ds = resumable_read(ray.data.read_parquet, str(tmp_path / "in"), checkpoint=tmp_path / "ckpt")
    with pytest.raises(ValueError, match=r"is ray_resume's own\. Give the column another name"):
        resumable_write(ds, tmp_path / "out")
    assert Checkpoint(tmp_path / "ckpt").status().completed == 0
    assert list((tmp_path / "out").iterdir()) == []


# --- UDFs ---


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("form", ["numpy", "pandas"])
def test_a_udf_may_fill_anew_what_it_returned_of_another_source(form: str) -> None:
    """In plain Ray Data there would be one call for all of them."""
    numbers = [0, 0, 1, 1, 2, 2]
    buffer, texts = np.empty(2, dtype=np.int64), np.empty(2, dtype=object)
    frame = pd.DataFrame({"x": np.empty(2, dtype=np.int64)})

    @resumable
    def refill(batch: Batch) -> Batch:
        if form == "numpy":
            buffer[:], texts[:] = x_of(batch), list(map(str, x_of(batch)))
            return {"x": buffer, "text": texts}
        frame["x"] = x_of(batch)
        frame["text"] = list(map(str, x_of(batch)))
        return frame

    desk = Desk(3)
    output = instrument(refill, desk)(batch_of(numbers, desk, form))  # type: ignore[arg-type]
    assert list(x_of(output)) == list(range(6))
    assert list(blocks.column(output, "text")) == list("012345")


def _mutate(batch: Any) -> Any:
    if isinstance(batch, dict):
        batch["x"] = np.full(len(batch["x"]), -1)
        batch["deep"][:] = [[-1]] * len(batch["deep"])
    elif isinstance(batch, pd.DataFrame):
        batch["x"] = -1
    return batch


MISDEEDS: dict[str, Callable[[Any], Any]] = {
    "as it should": lambda batch: batch,
    "none": lambda _: None,
    "nothing": lambda batch: blocks.take(batch, np.zeros(len(x_of(batch)), dtype=bool)),
    "twice": lambda batch: blocks.take(batch, np.repeat(np.arange(len(x_of(batch))), 2)),
    "raises": lambda _: 1 / 0,
    "garbage": lambda _: object(),
    "text": lambda _: "rows",
    "number": lambda _: 7,
    "ragged": lambda _: {"x": np.arange(2), "y": np.arange(3)},
    "scalar column": lambda _: {"x": 3},
    "our column": lambda batch: {"x": x_of(batch), TOKEN_COLUMN: x_of(batch)},
    "our other column": lambda batch: {"x": x_of(batch), SOURCE_COLUMN: x_of(batch)},
    "floats": lambda batch: {"x": np.array(x_of(batch), dtype=np.float64)},
    "texts": lambda batch: {"x": np.array(list(map(str, x_of(batch))))},
    "objects": lambda batch: {"x": np.array([None, *x_of(batch)], dtype=object)},
    "other columns": lambda batch: {"z": np.array(x_of(batch))},
    "no columns": lambda _: {},
    "mutated": _mutate,
    "a frame": lambda batch: pd.DataFrame({"x": x_of(batch)}, index=[7] * len(x_of(batch))),
    "a table": lambda batch: pa.table({"x": x_of(batch)}),
}


@pytest.mark.usefixtures("cluster")
@settings(max_examples=300, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    form=st.sampled_from(["numpy", "pandas", "pyarrow"]),
    misdeeds=st.lists(st.sampled_from(sorted(MISDEEDS)), min_size=1, max_size=4),
    on_error=st.sampled_from(["raise", "mark_failed", "dead_letter"]),
    generator=st.booleans(),
)
def test_whatever_a_udf_does_no_row_is_lost_silently(
    numbers: list[int], form: str, misdeeds: list[str], on_error: Any, generator: bool
) -> None:
    """A source completes if all its rows went through a call that ended well, or to the letters."""
    present = sorted(set(numbers))
    numbers = [present.index(number) for number in numbers]
    # What happens to the rows of a source depends on nothing but the source.
    fate = {source: misdeeds[source % len(misdeeds)] for source in range(len(present))}

    def misbehave(batch: Any) -> Any:
        return MISDEEDS[fate[numbers[x_of(batch)[0]]]](batch)

    def misbehave_in_pieces(batch: Any) -> Any:
        yield misbehave(batch)

    desk = Desk(len(present))
    udf = resumable(misbehave_in_pieces if generator else misbehave, on_error=on_error)
    batch = batch_of(numbers, desk, form)
    outputs: list[Any] = []
    raised = False
    try:
        result = instrument(udf, desk)(batch)  # type: ignore[arg-type]
        for output in result if hasattr(result, "__next__") else [result]:
            outputs.append(user_batches.materialized(output))  # noqa: PERF401
    except Exception:
        raised = True
    rows: dict[int, int] = dict.fromkeys(range(len(present)), 0)
    for output in outputs:
        _, sources, tokens = blocks.split_tracking_columns(blocks.table_of(output))
        for source in sources.tolist():
            rows[source] += 1
        desk_drain(desk, sources, tokens)
    assert raised <= (on_error == "raise" or bool(set(fate.values()) & NEVER_A_BATCH))
    for source in desk.completed:
        count = numbers.count(source)
        deed = fate[source]
        if deed in ("raises", *NEVER_A_BATCH):
            assert on_error == "dead_letter", deed
            continue
        expected = {"none": 0, "nothing": 0, "no columns": 0, "twice": 2 * count}.get(deed, count)
        assert rows[source] == expected + (deed == "objects")
    if not raised and not set(fate.values()) & {"raises", *NEVER_A_BATCH}:
        assert desk.completed == set(range(len(present)))


NEVER_A_BATCH = {
    "garbage",
    "text",
    "number",
    "ragged",
    "scalar column",
    "our column",
    "our other column",
}


def desk_drain(desk: Desk, sources: Any, tokens: Any) -> None:
    from ray_resume.core.messages import Drain
    from ray_resume.core.tokens import MODULUS, token_sum

    for source in np.unique(sources).tolist():
        desk.send(Drain(source, -token_sum(tokens[sources == source]) % MODULUS, 1))
