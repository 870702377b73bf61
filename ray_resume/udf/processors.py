"""Decorates the processors of ``ray.data.llm``: each of their stages is one to one.

A stage runs a subclass of Ray's class, since other processors run the same class.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from ray_resume.errors import NonResumableError
from ray_resume.raydata import llm
from ray_resume.udf.failures import mark_failed
from ray_resume.udf.marks import StageOptions, marked_function, options_of, set_mark

__all__ = ["decorated_processor"]


def decorated_processor(options: StageOptions, processor: Any) -> Any:
    """Return a copy of ``processor`` whose pre- and postprocessing and stages are decorated.

    Rows that a stage leaves with an inference error fail in that stage.

    Raises:
        NonResumableError: a stage may not be one to one, or is decorated already.
        ValueError: an option says what is known already.
    """
    if options.one_to_one or options.sink or (options.origin or options.by) is not None:
        raise ValueError(
            "one_to_one, by, origin and sink are not for a processor: its stages are one to one"
        )
    of_stage = replace(options, one_to_one=True)

    def mark_row_udf(udf: Any) -> Any:
        _refuse_marked(udf)
        return marked_function(options, udf, llm.user_function_of(udf))

    def mark_stage_udf(udf: type) -> type:
        _refuse_marked(udf)
        return _marked_stage(of_stage, udf)

    return llm.processor_with(processor, mark_row_udf, mark_stage_udf)


def _refuse_marked(udf: Any) -> None:
    if options_of(udf) is not None:
        raise NonResumableError(
            "The processor is decorated already. Decorate the one that build_processor returned."
        )


def _marked_stage(options: StageOptions, udf: type) -> type:
    call: Any = udf.__call__

    @functools.wraps(call)
    async def call_stage(self: Any, batch: Any) -> AsyncIterator[Any]:
        async for output in call(self, batch):
            for position, row in enumerate(llm.rows_in(self, output)):
                if error := llm.error_of(row):
                    mark_failed(error, [position])
            yield output

    # Workers get the class by value, since no module has it under this name.
    names = {"__call__": call_stage, "__module__": __name__, "__doc__": udf.__doc__}
    marked = type(udf.__name__, (udf,), names)
    set_mark(marked, options)
    return marked
