"""Processors of `ray.data.llm`, with a server of one's own and stand-ins for engines."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from conftest import write_source
from model_server import SECRET, Model
from places import PATHS, TESTS

from ray_resume import (
    Checkpoint,
    NonResumableError,
    PipelineChangedError,
    mark_failed,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.core.plain_values import digest_of_value
from ray_resume.raydata.llm import signed_arguments
from ray_resume.udf.marks import options_of

# Older versions of Ray load whole engines with it.
llm = pytest.importorskip("ray.data.llm", exc_type=ImportError)


def ask(row: dict[str, Any], model: str = "small") -> dict[str, Any]:
    return {"payload": {"id": row["id"], "prompt": row["name"], "model": model}}


def answer(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "length": row["http_response"].get("length", -1)}


def checked(row: dict[str, Any]) -> dict[str, Any]:
    # Rows of a batch have the same fields.
    if row["http_response"].get("error") is not None:
        mark_failed(row["http_response"]["error"])
        return {}
    return answer(row)


def http(
    model: Model, key: str = SECRET, post: Any = answer, pre: Any = ask, **options: Any
) -> Any:
    headers = {"Authorization": f"Bearer {key}"}
    config = llm.HttpRequestProcessorConfig(
        **{"url": model.url(key), "headers": headers, "batch_size": 16, **options}
    )
    return llm.build_processor(config, preprocess=pre, postprocess=post)


def read(tmp_path: Path, checkpoint: str = "c", **options: Any) -> Any:
    return resumable_read(
        ray.data.read_parquet, str(tmp_path / "in"), checkpoint=tmp_path / checkpoint, **options
    )


def rows_in(folder: Path) -> Counter[str]:
    tables = map(pq.read_table, folder.glob("*.parquet"))
    return Counter(repr(row) for table in tables for row in table.to_pylist())


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_a_server_that_dies_costs_the_sources_in_progress(tmp_path: Path, model: Model) -> None:
    write_source(tmp_path / "in", files=4, rows=10)
    # Another processor with the same stages stays plain.
    plain = http(model, SECRET)
    expected = Counter(map(repr, plain(ray.data.read_parquet(str(tmp_path / "in"))).take_all()))
    model.seen.clear()

    def run(processor: Any, version: str | None = None) -> Any:
        ds = resumable(processor, version=version)(read(tmp_path, override_num_blocks=4))
        return resumable_write(ds, str(tmp_path / "out"), commit_interval_s=0.1, progress=False)

    model.down_from = 25
    with pytest.raises(Exception, match="Reached maximum retries"):
        run(http(model, base_retry_wait_time_in_s=0.01, batch_size=5))
    done = {int(Path(one.source_id).stem) for one in Checkpoint(tmp_path / "c").sources()}
    assert done <= {0, 1}
    before = dict(model.seen)

    model.down_from = float("inf")
    # Another key, and how fast it goes, make no other pipeline.
    summary = run(http(model, "sk-rotated", batch_size=16, max_retries=2, qps=1000))
    assert (summary.sources_skipped, summary.sources_completed) == (len(done), 4 - len(done))
    again = {x // 10 for x in model.seen if model.seen[x] > before.get(x, 0)}
    assert again == set(range(4)) - done
    assert rows_in(tmp_path / "out") == expected
    stage = summary.stages[1]
    assert (stage.name, stage.calls) == ("map_batches(HttpRequestUDF)", stage.batches)

    model.seen.clear()
    assert run(http(model)).sources_skipped == 4
    assert not model.seen
    assert model.keys == {f"Bearer {SECRET}", "Bearer sk-rotated"}
    held = b"".join(path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file())
    assert b"HttpRequestUDF" in held
    assert SECRET.encode() not in held
    assert b"rotated" not in held

    for changed in (
        http(model, url=model.url().replace("n=1", "n=2")),
        http(model, pre=functools.partial(ask, model="large")),
    ):
        with pytest.raises(PipelineChangedError):
            run(changed)
    with pytest.raises(PipelineChangedError, match=r"map_batches\(HttpRequestUDF.*version=2026-11"):
        run(http(model), version="2026-11")
    assert not model.seen


@pytest.mark.usefixtures("cluster")
def test_rows_without_an_answer_fail_alone(tmp_path: Path, model: Model) -> None:
    write_source(tmp_path / "in", files=2, rows=5)
    processor = resumable(http(model, post=checked), on_error="dead_letter")
    ds = processor(read(tmp_path, override_num_blocks=1))
    summary = resumable_write(ds, str(tmp_path / "out"), progress=False)
    assert (summary.sources_completed, summary.rows_dead_lettered) == (2, 1)
    assert sum(rows_in(tmp_path / "out").values()) == 9


@pytest.mark.usefixtures("cluster")
def test_the_processor_that_was_passed_stays_as_it_was(model: Model) -> None:
    processor = http(model)
    stages, kinds = dict(processor.stages), {n: s.fn for n, s in processor.stages.items()}
    decorated = resumable(processor, on_error="mark_failed", isolate=True)
    assert dict(processor.stages) == stages
    assert {n: s.fn for n, s in processor.stages.items()} == kinds
    for name, stage in decorated.stages.items():
        assert options_of(kinds[name]) is None
        options = options_of(stage.fn)
        assert options is not None
        assert (options.one_to_one, options.on_error, options.isolate) == (
            True,
            "mark_failed",
            True,
        )
        assert stage.fn_constructor_kwargs is not stages[name].fn_constructor_kwargs
    assert options_of(processor.preprocess) is None
    assert decorated.preprocess.__name__ == "ask"
    assert decorated.config is processor.config

    with pytest.raises(NonResumableError, match="decorated already"):
        resumable(decorated)
    with pytest.raises(ValueError, match="not for a processor"):
        resumable(processor, by="id")

    class Own(next(iter(kinds.values()))):  # type: ignore[misc]
        async def __call__(self, batch: Any) -> Any:
            yield batch

    own = http(model)
    own.stages["HttpRequestStage"].fn = Own
    with pytest.raises(NonResumableError, match=r"HttpRequestStage .* runs Own"):
        resumable(own)


def test_secrets_and_speed_are_not_in_the_signature() -> None:
    from ray.llm._internal.batch.stages.base import StatefulStageUDF

    class Stage(StatefulStageUDF):
        pass

    arguments = {
        "model": "m",
        "batch_size": 8,
        "url": f"https://u:{SECRET}@h:1/p?token={SECRET}&n=1",
    }
    assert signed_arguments(Stage, arguments) == {"model": "m", "url": "https://h:1/p?n=1"}
    assert signed_arguments(ask, arguments) == arguments

    def engine(**options: Any) -> str | None:
        return digest_of_value({"engine_kwargs": {"max_model_len": 9, **options}})

    assert engine(hf_token="a") == engine(hf_token="b") != engine(hf_token="a", seed=1)


ENGINES = {
    "torch": "from engine_stand_ins import Tensor, bfloat16, hub",
    "transformers": "from engine_stand_ins import AutoConfig",
    "sglang": "from engine_stand_ins import SGLangEngine as Engine",
    "vllm": """
from engine_stand_ins import AsyncEngineArgs, AsyncLLMEngine, SamplingParams, inputs, outputs
import sys
sys.modules["vllm.inputs"], sys.modules["vllm.outputs"] = inputs, outputs
""",
}


@pytest.mark.extended
def test_engines_on_the_cluster(tmp_path: Path) -> None:
    """Ray's own stages with engines that fail for some prompts, in a process of its own."""
    for name, text in ENGINES.items():
        (tmp_path / "engines" / name).mkdir(parents=True)
        (tmp_path / "engines" / name / "__init__.py").write_text(text)
    write_source(tmp_path / "in", files=4, rows=10)
    paths = os.pathsep.join([*PATHS, str(tmp_path / "engines")])
    script = str(TESTS / "drivers" / "llm_driver.py")
    result = subprocess.run(
        [sys.executable, script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == "done"
