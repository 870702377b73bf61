"""Processors of ``ray.data.llm``: which operators they make, and what may be known of them.

This module does not load Ray's. The user's code has done so if there is a processor.

Internals of Ray's that are used:

* ``Processor``'s ``preprocess``, ``stages`` and ``postprocess``, and the ``fn`` of a stage: what a
  processor makes operators of. Ray has no public way to change the class that a stage runs.
* ``StatefulStageUDF.__call__``: it returns one row for each row, in their order, or raises.
* ``__inference_error__``: the field in which a stage says that a row has failed.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from ray_resume.core.plain_values import is_secret
from ray_resume.errors import NonResumableError

__all__ = [
    "error_of",
    "is_processor",
    "processor_with",
    "rows_in",
    "signed_arguments",
    "user_function_of",
]

_PROCESSORS = "ray.llm._internal.batch.processor.base"
_STAGES = "ray.llm._internal.batch.stages.base"


def is_processor(value: Any) -> bool:
    """Say whether ``value`` is a processor that ``build_processor`` has made."""
    kind = getattr(sys.modules.get(_PROCESSORS), "Processor", None)
    return kind is not None and isinstance(value, kind)


def processor_with(
    processor: Any, mark_row_udf: Callable[[Any], Any], mark_stage_udf: Callable[[type], type]
) -> Any:
    """Return a copy of a processor, with other UDFs in the places of its own.

    Raises:
        NonResumableError: a stage may return other rows than one for each row, in their order.
    """
    changed = copy.copy(processor)
    for name in ("preprocess", "postprocess"):
        if getattr(processor, name) is not None:
            setattr(changed, name, mark_row_udf(getattr(processor, name)))
    changed.stages = type(processor.stages)(
        (name, _stage_with(name, stage, mark_stage_udf)) for name, stage in processor.stages.items()
    )
    return changed


def _stage_with(name: str, stage: Any, mark: Callable[[type], type]) -> Any:
    checked = getattr(sys.modules.get(_STAGES), "StatefulStageUDF", None)
    if checked is None or stage.fn.__call__ is not checked.__call__:
        raise NonResumableError(
            f"The stage {name} of the processor runs {stage.fn.__name__}, which does not leave it "
            "to Ray to check that it returns a row for each row. Derive it from Ray's "
            "StatefulStageUDF, and override udf() instead of __call__()."
        )
    arguments = {of: dict(getattr(stage, of)) for of in _ARGUMENTS}
    return stage.model_copy(update={"fn": mark(stage.fn), **arguments})


# A change to those of one processor must not change the other.
_ARGUMENTS = ("fn_constructor_kwargs", "map_batches_kwargs")


def user_function_of(udf: Any) -> Any:
    """Return the user's function in the pre- or postprocessing of a processor, if it is known."""
    within = inspect.getclosurevars(udf).nonlocals if inspect.isfunction(udf) else {}
    return within.get("fn", udf)


def rows_in(stage: Any, output: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows of what a stage's UDF has put out."""
    return list(output.get(stage.data_column, ()))


def error_of(row: Mapping[str, Any]) -> str:
    """Return the error that a row of a processor has failed with, empty if it has not."""
    return row.get("__inference_error__") or ""


def signed_arguments(udf: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments of a UDF's constructor that its output depends on.

    How fast a stage of a processor goes, and how it deals with errors, may change from run to run.
    """
    stage = getattr(sys.modules.get(_STAGES), "StatefulStageUDF", None)
    if stage is None or not inspect.isclass(udf) or not issubclass(udf, stage):
        return dict(arguments)
    signed = {name: of for name, of in arguments.items() if name not in _UNSIGNED}
    if isinstance(signed.get("url"), str):
        signed["url"] = _without_credentials(signed["url"])
    return signed


_UNSIGNED = {
    *("data_column", "expected_input_keys", "batch_size", "max_concurrent_batches"),
    *("max_pending_requests", "log_engine_metrics", "should_continue_on_error", "session_factory"),
    *("request_timeout_s", "qps", "max_retries", "base_retry_wait_time_in_s"),
}


def _without_credentials(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    query = [(name, of) for name, of in parse_qsl(parts.query) if not is_secret(name)]
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query=urlencode(query)).geturl()
