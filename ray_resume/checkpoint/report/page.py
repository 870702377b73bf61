"""The page of a report: a template, the charts, and all that they need, in one file.

Importing this module needs the extra ``[report]``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from functools import cache
from importlib import resources
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.moments import time_text
from ray_resume.checkpoint.report.charts import OUTCOMES, STATES, charts_of
from ray_resume.checkpoint.report.facts import ReportFacts, Sizes, facts_of
from ray_resume.checkpoint.report.texts import file_size, number, shown, span
from ray_resume.core.wording import counted, duration
from ray_resume.errors import ResumeError
from ray_resume.files import write_atomically

__all__ = ["page_of", "write_report"]

_EXPORT = "window.vegaEmbed = vegaEmbed;"
# In a script, it is part of a text.
_TAG = re.compile(r"<(?=/?script|!--)", re.IGNORECASE)


def write_report(storage: CheckpointBackend, path: str, checkpoint: str, sizes: Sizes) -> None:
    """Write the report of a checkpoint to a file of this host; replace one that is there.

    Args:
        checkpoint: how the checkpoint is called.
        sizes: see `facts.facts_of`.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read.
        ResumeError: the file cannot be written.
    """
    now = time.time()
    page = page_of(facts_of(storage, now, sizes), checkpoint, now)
    try:
        write_atomically(path, page.encode())
    except OSError as error:
        raise ResumeError(
            f"The report cannot be written to {path}: {error.strerror or error}. Give a path in a "
            "folder that exists, and in which this user may write."
        ) from error


def page_of(facts: ReportFacts, checkpoint: str, now: float) -> str:
    """Return the page."""
    libraries, start = _libraries(), _resource("page.js")
    charts = charts_of(facts)
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(
        counted=counted,
        duration=duration,
        file_size=file_size,
        when=time_text,
        number=number,
        span=span,
    )
    return environment.from_string(_resource("page.html")).render(
        facts=facts,
        checkpoint=checkpoint,
        made=time_text(now),
        states=STATES,
        outcomes=OUTCOMES,
        style=Markup(_resource("page.css")),
        scripts=[Markup(script) for script in (libraries, start)],
        hashes=[_hash(script) for script in (libraries, start)],
        drawn=frozenset(charts),
        charts=Markup(_as_json(charts)),
    )


def _shown(value: Any) -> Any:
    """Prepare each text that goes into the template; it is escaped after that."""
    return shown(value) if type(value) is str else value


def _as_json(value: Any) -> str:
    """Serialize for a script element: pure ASCII, in which nothing can end the element."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _libraries() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script that needs no network."""
    version = alt.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]
    bundle = vl_convert.javascript_bundle(_EXPORT, vl_version=version)
    return _script(bundle)


def _script(source: str) -> str:
    """Return a script that cannot end its element, and is as a browser reads and hashes it."""
    return _TAG.sub(r"\\x3c", source.replace("\r", ""))


def _hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
