"""The decorator and what it becomes, without Ray Data: marks, pickles, batches in and out."""

from __future__ import annotations

import functools
import inspect
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from ledger_desk import Desk
from ray import cloudpickle

from ray_resume import NonResumableError, resumable
from ray_resume.core.messages import Seal
from ray_resume.core.tokens import SOURCE_COLUMN, TOKEN_COLUMN, token_sum, tokens
from ray_resume.raydata import blocks
from ray_resume.udf.decorator import options_of
from ray_resume.udf.stage import instrument


@resumable
def plain(batch: dict[str, Any], more: int = 1) -> dict[str, Any]:
    """Say what it does."""
    return batch


@resumable(origin="o")
def generating(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield batch


@resumable(one_to_one=True)
class Classy:
    """A class."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "x": batch["x"] * self.factor}


def by_value(udf: Any) -> Any:
    """Send it as Ray does."""
    dumps: Any = cloudpickle.dumps
    return cloudpickle.loads(dumps(udf))


class TestDecoration:
    def test_name_signature_and_docs_survive(self) -> None:
        assert plain.__name__ == "plain"
        assert plain.__doc__ == "Say what it does."
        assert list(inspect.signature(plain).parameters) == ["batch", "more"]
        assert inspect.isgeneratorfunction(generating)
        assert Classy.__name__ == "Classy"
        assert Classy.__doc__ == "A class."
        assert list(inspect.signature(Classy).parameters) == ["factor"]

    def test_it_does_nothing_on_its_own(self) -> None:
        batch = {"x": np.arange(3)}
        assert plain(batch) is batch
        assert list(generating(batch)) == [batch]
        assert Classy(2)(batch)["x"].tolist() == [0, 2, 4]

    @pytest.mark.parametrize("udf", [plain, generating, Classy])
    def test_it_survives_both_pickles(self, udf: Any) -> None:
        assert pickle.loads(pickle.dumps(udf)) is udf
        assert options_of(by_value(udf)) == options_of(udf)

    def test_local_functions_and_partials_are_pickled_by_value(self) -> None:
        scale = 3

        @resumable
        def local(batch: dict[str, Any], by: int) -> dict[str, Any]:
            return {"x": batch["x"] * scale * by}

        again = by_value(functools.partial(local, by=2))
        assert again({"x": np.arange(2)})["x"].tolist() == [0, 6]
        assert options_of(again) is not None
        decorated = resumable(functools.partial(lambda batch, by: by, by=4))
        assert decorated({}) == 4

    def test_the_function_itself_is_not_marked(self) -> None:
        def mine(batch: Any) -> Any:
            return batch

        assert options_of(resumable(mine)) is not None
        assert options_of(mine) is None
        assert options_of(resumable(mine, one_to_one=True)) != options_of(resumable(mine))

    def test_decorating_twice(self) -> None:
        assert resumable(plain) is plain
        with pytest.raises(NonResumableError, match="already decorated"):
            resumable(plain, one_to_one=True)
        with pytest.raises(NonResumableError, match="already decorated"):
            resumable(Classy)

    def test_two_versions_of_a_class_are_two_classes(self) -> None:
        class Model:
            def __call__(self, batch: Any) -> Any:
                return batch

        class Other(Model):
            pass

        resumable(Model, version="a")
        told = (
            r"^Model is already decorated, by @resumable\(version='a'\)\. It cannot be decorated "
            r"by @resumable\(one_to_one=True, version='b'\) as well\. A class .* derived from it"
        )
        with pytest.raises(NonResumableError, match=told):
            resumable(Model, one_to_one=True, version="b")
        resumable(Other, one_to_one=True, version="b")

    def test_what_cannot_be_a_udf_is_refused_at_decoration(self) -> None:
        class NoCall:
            pass

        async def coroutine(batch: Any) -> Any:
            return batch

        wrong: Any
        for wrong in (NoCall, 3, coroutine):
            with pytest.raises(NonResumableError):
                resumable(wrong)
        with pytest.raises(ValueError, match="on_error must be one of"):
            resumable(on_error="ignore")
        with pytest.raises(ValueError, match="isolate=True needs"):
            resumable(isolate=True)
        with pytest.raises(ValueError, match="exclude"):
            resumable(one_to_one=True, origin="o")
        with pytest.raises(ValueError, match="exclude"):
            resumable(by="b", origin="o")
        with pytest.raises(ValueError, match="sink=True excludes"):
            resumable(by="b", sink=True)
        with pytest.raises(ValueError, match="version must be a text"):
            resumable(version="")
        with pytest.raises(ValueError, match="by must be the name"):
            resumable(by=3)  # type: ignore[call-overload]
        with pytest.raises(ValueError, match="origin"):
            resumable(origin="")


def drain(desk: Desk, outputs: list[Any]) -> None:
    """Drain what a stage put out, as a sink does."""
    for output in outputs:
        _, sources, values = blocks.split_tracking_columns(output)
        desk.drain(sources, values)


SOURCES = np.array([0, 0, 1, 1, 1, 0, 2], dtype=np.int32)


def batch_in(kind: str, desk: Desk) -> Any:
    """Seven rows of three sources, one of which stands in two places; sealed."""
    values = tokens(11, 0, 7)
    for source in range(3):
        desk.send(Seal(source, token_sum(values[source == SOURCES])))
    rows = {"x": np.arange(7), "name": np.array(list("abcdefg"))}
    batch: Any = rows
    if kind == "pandas":
        batch = pd.DataFrame(rows, index=[5, 5, 3, 3, 1, 0, 9])
    elif kind == "pyarrow":
        batch = pa.table(rows)
    return blocks.with_tracking_columns(batch, SOURCES, values)


def run(udf: Any, kind: str, *arguments: Any, **construct: Any) -> tuple[list[list[int]], Desk]:
    """Run an armed UDF and a sink: the ``x`` of each output block, and the ledger after it."""
    desk = Desk(3)
    ready = instrument(udf, desk)  # type: ignore[arg-type]
    if inspect.isclass(ready):
        ready = ready(**construct)
    result = ready(batch_in(kind, desk), *arguments)
    outputs = list(result) if inspect.isgenerator(result) else [result]
    for output in outputs:
        assert np.asarray(blocks.column(output, SOURCE_COLUMN)).dtype == np.int32
        assert np.asarray(blocks.column(output, TOKEN_COLUMN)).dtype == np.uint64
    drain(desk, outputs)
    return [np.asarray(blocks.column(output, "x")).tolist() for output in outputs], desk


def keep_where(batch: Any, mask: Any) -> Any:
    return blocks.take(batch, np.asarray(mask))


KINDS = pytest.mark.parametrize("kind", ["numpy", "pandas", "pyarrow"])


def x_of(batch: Any) -> Any:
    return np.asarray(blocks.column(batch, "x"))


@KINDS
class TestArmed:
    def test_a_udf_sees_one_source_at_a_time_and_none_of_our_columns(self, kind: str) -> None:
        seen: list[list[int]] = []

        @resumable
        def look(batch: Any) -> Any:
            assert list(blocks.names(batch)) == ["x", "name"]
            seen.append(x_of(batch).tolist())
            return batch

        outputs, desk = run(look, kind)
        assert seen == [[0, 1, 5], [2, 3, 4], [6]]
        assert outputs == (seen if kind == "pyarrow" else [[0, 1, 5, 2, 3, 4, 6]])
        assert desk.completed == {0, 1, 2}

    def test_dropped_rows_dropped_sources_and_none(self, kind: str) -> None:
        @resumable
        def drop(batch: Any) -> Any:
            if 6 in x_of(batch):
                return None
            return keep_where(batch, x_of(batch) >= 3)

        outputs, desk = run(drop, kind)
        assert outputs == ([[5], [3, 4]] if kind == "pyarrow" else [[5, 3, 4]])
        assert desk.completed == {0, 1, 2}

    def test_empty_outputs_keep_the_typed_columns(self, kind: str) -> None:
        @resumable
        def nothing(batch: Any) -> Any:
            return keep_where(batch, np.zeros(len(x_of(batch)), dtype=bool))

        outputs, desk = run(nothing, kind)
        assert not any(outputs)
        assert desk.completed == {0, 1, 2}

    def test_a_generator_with_empty_and_missing_pieces(self, kind: str) -> None:
        @resumable
        def pieces(batch: Any) -> Iterator[Any]:
            yield None
            for x in x_of(batch):
                yield keep_where(batch, x_of(batch) == x)
                yield keep_where(batch, x_of(batch) < 0)
            if 2 in x_of(batch):
                yield None

        outputs, desk = run(pieces, kind)
        assert [x for block in outputs for x in block] == [0, 1, 5, 2, 3, 4, 6]
        assert desk.completed == {0, 1, 2}

    def test_a_generator_that_yields_nothing(self, kind: str) -> None:
        @resumable
        def silent(batch: Any) -> Iterator[Any]:
            yield from ()

        outputs, desk = run(silent, kind)
        assert outputs == []
        assert desk.completed == {0, 1, 2}

    def test_a_generator_left_in_the_middle_completes_nothing(self, kind: str) -> None:
        @resumable(origin="o")
        def pieces(batch: Any) -> Iterator[Any]:
            for row in range(7):
                yield blocks.take(batch, np.array([row]))

        desk = Desk(3)
        result = instrument(pieces, desk)(batch_in(kind, desk))  # type: ignore[arg-type]
        taken = [next(result) for _ in range(6)]
        drain(desk, taken)
        assert desk.completed == set()
        drain(desk, list(result))
        assert desk.completed == {0, 1, 2}

    def test_one_to_one_keeps_batches_whole(self, kind: str) -> None:
        outputs, desk = run(Classy, kind, factor=10) if kind == "numpy" else run(OneToOne, kind)
        assert len(outputs) == 1
        assert len(outputs[0]) == 7
        assert desk.completed == {0, 1, 2}

    def test_one_to_one_with_other_rows_is_an_error(self, kind: str) -> None:
        @resumable(one_to_one=True)
        def loses(batch: Any) -> Any:
            return keep_where(batch, x_of(batch) > 0)

        @resumable(one_to_one=True)
        def grows(batch: Any) -> Iterator[Any]:
            yield batch
            yield batch

        for wrong, said in ((loses, "6 rows for 7"), (grows, "14 rows for 7")):
            with pytest.raises(ValueError, match=said):
                run(wrong, kind)

    def test_origin_on_whole_batches(self, kind: str) -> None:
        @resumable(origin="o")
        def shuffle_and_copy(batch: Any) -> Any:
            assert len(x_of(batch)) == 7
            return blocks.take(batch, np.array([4, 0, 0, 5, 4]))

        outputs, desk = run(shuffle_and_copy, kind)
        assert outputs == [[4, 0, 0, 5, 4]]
        assert desk.completed == {0, 1, 2}, "source 2 has no row left, so its tokens are drained"

    @pytest.mark.parametrize(
        ("origin", "said"),
        [
            ([0, 7], "outside 0 .. 6"),
            ([-1, 0], "outside"),
            ([0.0, 1.0], "not as integers"),
            (None, "without"),
        ],
    )
    def test_wrong_origins_are_errors(self, kind: str, origin: Any, said: str) -> None:
        @resumable(origin="o")
        def wrong(batch: Any) -> Any:
            part = blocks.without_columns(blocks.take(batch, np.array([0, 1])), ("o",))
            return part if origin is None else blocks.with_column(part, "o", np.array(origin))

        with pytest.raises(ValueError, match=said):
            run(wrong, kind)

    def test_what_is_no_batch_is_an_error(self, kind: str) -> None:
        for wrong in ([1, 2], np.arange(3), "text"):
            udf = resumable(lambda batch, wrong=wrong: wrong)
            with pytest.raises(ValueError, match="allowed"):
                run(udf, kind)

    def test_a_udf_that_returns_our_columns_is_an_error(self, kind: str) -> None:
        @resumable
        def collides(batch: Any) -> Any:
            return blocks.with_column(batch, TOKEN_COLUMN, np.arange(len(x_of(batch))))

        with pytest.raises(ValueError, match="own"):
            run(collides, kind)

    def test_rows_that_lost_our_columns_are_an_error(self, kind: str) -> None:
        desk = Desk(3)
        stripped = blocks.without_columns(batch_in(kind, desk), (TOKEN_COLUMN,))
        with pytest.raises(RuntimeError, match="cannot be accounted for"):
            instrument(plain, desk)(stripped)  # type: ignore[arg-type]


@resumable(one_to_one=True)
class OneToOne:
    def __call__(self, batch: Any) -> Any:
        return batch


def test_what_a_generator_reuses_does_no_harm() -> None:
    """A dict, an array of objects, a list: filled anew while a batch is held back."""

    @resumable
    def reuses(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        out: dict[str, Any] = {"name": np.empty(1, dtype=object), "list": [None]}
        for x, name in zip(batch["x"], batch["name"], strict=True):
            out["x"] = np.array([x])
            out["name"][:] = [str(name)]
            out["list"][:] = [str(name) * 2]
            yield out

    desk = Desk(3)
    outputs = list(instrument(reuses, desk)(batch_in("numpy", desk)))  # type: ignore[arg-type]
    rows = [row for output in outputs for row in pa.table(output).to_pylist()]
    assert [(row["x"], row["name"], row["list"]) for row in rows] == [
        (x, "abcdefg"[x], "abcdefg"[x] * 2) for x in (0, 1, 5, 2, 3, 4, 6)
    ]


def test_parts_of_a_pandas_batch_have_an_index_of_their_own() -> None:
    @resumable
    def aligns(frame: Any) -> Any:
        return frame.assign(y=pd.Series([10 * x for x in frame["x"]]))

    desk = Desk(3)
    rows = instrument(aligns, desk)(batch_in("pandas", desk))  # type: ignore[arg-type]
    assert (rows["y"] == rows["x"] * 10).all()
    assert len(rows) == 7


def test_an_armed_udf_has_the_name_of_the_users() -> None:
    desk: Any = Desk(1)
    assert instrument(plain, desk).__name__ == "plain"
    assert instrument(Classy, desk).__name__ == "Classy"
    assert instrument(functools.partial(plain, more=2), desk).__name__ == "plain"
