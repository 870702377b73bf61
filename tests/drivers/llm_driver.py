"""Runs a processor with a stand-in for each engine: `llm_driver.py FOLDER`.

It compares with plain Ray Data, fails for some prompts, and resumes. It prints "done".
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from ray.data import llm
from small_cluster import start_cluster

from ray_resume import Checkpoint, resumable, resumable_read, resumable_write

FOLDER = Path(sys.argv[1])
BAD, SEEN = FOLDER / "bad", FOLDER / "seen"


def ask(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["name"], "sampling_params": {"temperature": 0.5, "max_tokens": 9}}


def answer(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "text": row["generated_text"]}


def processor(engine: str, seed: int = 0) -> Any:
    options: dict[str, Any] = {"chat_template_stage": False, "tokenize_stage": False}
    options |= {"detokenize_stage": False, "batch_size": 8, "model_source": "stand-in"}
    options["engine_kwargs"] = {"seed": seed, "hf_token": "hf_secret"}
    if engine == "vllm":
        config: Any = llm.vLLMEngineProcessorConfig(
            should_continue_on_error=True, log_engine_metrics=False, **options
        )
    else:
        options["engine_kwargs"]["skip_tokenizer_init"] = False
        config = llm.SGLangEngineProcessorConfig(**options)
    return llm.build_processor(config, preprocess=ask, postprocess=answer)


def checkpoint_of(engine: str) -> Path:
    return FOLDER / engine / "c"


def run(engine: str, **options: Any) -> Any:
    made = resumable(processor(engine), **options)
    assert next(iter(processor(engine).stages.values())).fn.__module__.startswith("ray.")
    ds = resumable_read(ray.data.read_parquet, str(FOLDER / "in"), checkpoint=checkpoint_of(engine))
    return resumable_write(made(ds), str(FOLDER / engine / "out"), progress=False)


def rows_in(folder: Path) -> Counter[str]:
    tables = map(pq.read_table, folder.glob("*.parquet"))
    return Counter(repr(row) for table in tables for row in table.to_pylist())


def main(engine: str) -> None:
    ds = ray.data.read_parquet(str(FOLDER / "in"))
    expected = Counter(map(repr, processor(engine)(ds).take_all()))
    assert len(expected) == 40

    BAD.write_text("row 5\nrow 33\n")
    if engine == "vllm":
        summary = run(engine, on_error="mark_failed")
        (stage,) = (one for one in summary.stages if "vLLM" in one.name)
        assert stage.rows_failed == 2, stage
        assert (summary.sources_completed, summary.sources_failed) == (2, 2), summary
        errors = [one.error for one in Checkpoint(checkpoint_of(engine)).sources(state="failed")]
        assert all("no answer to row" in str(error) for error in errors), errors
    else:
        # Its stage has no such option: the batch raises, and what was complete stays.
        with pytest.raises(Exception, match="no answer to row"):
            run(engine)
    done = {
        int(Path(one.source_id).stem)
        for one in Checkpoint(checkpoint_of(engine)).sources("completed")
    }

    BAD.unlink()
    SEEN.unlink()
    summary = run(engine, on_error="mark_failed")
    assert summary.complete, summary
    asked = {int(line.split()[1]) // 10 for line in SEEN.read_text().splitlines()}
    assert asked == set(range(4)) - done
    assert rows_in(FOLDER / engine / "out") == expected

    SEEN.unlink()
    assert run(engine).sources_skipped == 4
    assert not SEEN.exists()
    held = b"".join(
        path.read_bytes() for path in checkpoint_of(engine).rglob("*") if path.is_file()
    )
    assert b"hf_secret" not in held


if __name__ == "__main__":
    os.environ |= {"BAD_PROMPTS": str(BAD), "SEEN_PROMPTS": str(SEEN)}
    os.environ |= {"TORCH_HOME": str(FOLDER / "torch"), "RAY_USAGE_STATS_ENABLED": "0"}
    start_cluster(num_cpus=4, num_gpus=1, log_to_driver=True)
    for engine in ("vllm", "sglang"):
        main(engine)
    print(json.dumps("done"))
