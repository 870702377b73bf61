"""Stand-ins for engines of language models, as far as Ray's stages of them reach.

`test_llm` makes modules called ``vllm``, ``sglang``, ``torch`` and ``transformers`` of them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

# An engine fails for a prompt whose text is in this file.
BAD = Path(os.environ.get("BAD_PROMPTS", "/nonexistent"))
# Each engine notes the prompts that it gets.
SEEN = Path(os.environ.get("SEEN_PROMPTS", "/dev/null"))


def answer_to(prompt: str, **parameters: Any) -> str:
    with SEEN.open("a") as file:
        file.write(f"{prompt}\n")
    if BAD.exists() and prompt in BAD.read_text().splitlines():
        raise ValueError(f"no answer to {prompt}")
    return f"{prompt}, {sorted(parameters.items())}"


# What Ray's stages import of torch and transformers. ----------------------------------------------


class Tensor:
    pass


bfloat16 = "bfloat16"
hub = SimpleNamespace(_get_torch_home=lambda: os.environ["TORCH_HOME"])


class AutoConfig:
    @staticmethod
    def from_pretrained(*_: Any, **__: Any) -> Any:
        raise OSError("there is no such model")


# vLLM. --------------------------------------------------------------------------------------------

inputs, outputs = ModuleType("vllm.inputs"), ModuleType("vllm.outputs")
inputs.TokensPrompt = inputs.TextPrompt = dict  # type: ignore[attr-defined]


class RequestOutput(SimpleNamespace):
    pass


outputs.RequestOutput = RequestOutput  # type: ignore[attr-defined]
outputs.PoolingRequestOutput = Tensor  # type: ignore[attr-defined]


class SamplingParams:
    def __init__(self, structured_outputs: Any = None, **parameters: Any) -> None:
        self.parameters = parameters


class AsyncEngineArgs:
    def __init__(self, **kwargs: Any) -> None:
        self.kwargs = kwargs

    def create_engine_config(self) -> Any:
        return SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=8),
            parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        )


class AsyncLLMEngine:
    @classmethod
    def from_engine_args(cls, *_: Any, **__: Any) -> AsyncLLMEngine:
        return cls()

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, **_: Any
    ) -> AsyncIterator[Any]:
        await asyncio.sleep(0.001 * (len(prompt["prompt"]) % 3))
        text = answer_to(prompt["prompt"], **sampling_params.parameters)
        made = SimpleNamespace(token_ids=[1], text=text, logprobs=None)
        yield RequestOutput(
            finished=True, prompt_token_ids=[1], outputs=[made], metrics=None, prompt_logprobs=None
        )

    async def do_log_stats(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


# SGLang. ------------------------------------------------------------------------------------------


class SGLangEngine:
    def __init__(self, **_: Any) -> None:
        pass

    async def async_generate(self, prompt: str, sampling_params: Any, **_: Any) -> Any:
        return self._stream(answer_to(prompt, **sampling_params))

    async def _stream(self, text: str) -> AsyncIterator[dict[str, Any]]:
        about = {"finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1}
        yield {"text": text, "output_ids": [1], "meta_info": about}

    def shutdown(self) -> None:
        pass
