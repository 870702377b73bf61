"""The charts of a report, by Vega-Altair, as Vega-Lite specifications.

Colors are variables of the page's style sheet, so a chart follows the browser from light to dark.
Importing this module needs the extra ``[report]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import altair as alt

from ray_resume.checkpoint.moments import time_text
from ray_resume.checkpoint.report.facts import ReportFacts
from ray_resume.checkpoint.report.texts import file_size, middle_cut, span, unique
from ray_resume.core.wording import counted, duration

__all__ = ["OUTCOMES", "STATES", "charts_of"]

Chart: TypeAlias = "alt.Chart | alt.LayerChart"
Rows: TypeAlias = "Sequence[Mapping[str, Any]]"

STATES = ("completed", "quarantined", "failed", "pending")
OUTCOMES = ("completed", "incomplete", "running", "interrupted", "failed", "killed")

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_HEIGHT = 240
_ROW_HEIGHT = 24
_PER = ((1, "a second"), (60, "a minute"), (3600, "an hour"), (86400, "a day"))
# Labels leave most of a narrow screen to the bars.
_LABEL_LIMIT = "min(280, max(90, containerSize()[0] * 0.32))"


def charts_of(facts: ReportFacts) -> dict[str, dict[str, Any]]:
    """Return the charts for which there are data, by the ids of their places on the page."""
    charts = dict(_charts(facts))
    return {name: _configured(chart).to_dict() for name, chart in charts.items()}


def _charts(facts: ReportFacts) -> Iterator[tuple[str, Chart]]:
    if facts.status.total:
        yield "states", _states(facts)
    if len(facts.points) > 1:
        yield "progress", _progress(facts)
    if facts.bins:
        rates = [one.sources_per_s for one in facts.bins]
        yield "sources_per_s", _throughput(facts, rates, "Sources", "--completed")
        rates = [one.rows_per_s for one in facts.bins]
        if any(rates):
            yield "rows_per_s", _throughput(facts, rates, "Rows", "--rows")
    if facts.runs:
        yield "runs", _runs(facts)
    if any(stage.udf_s for stage in facts.stages):
        yield "stages", _stages(facts)
    if facts.slowest:
        yield "slowest", _slowest(facts)
    if facts.files is not None and facts.files.bins:
        yield "files", _files(facts)


def _configured(chart: Chart) -> Chart:
    """Let a chart fill the width of its place, in the colors and the font of the page."""
    configured: Chart = (
        chart.configure(
            background="transparent",
            # The browser measures labels in it, so it must name the fonts of the style sheet.
            font=_FONT,
            padding=2,
            autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
        )
        .configure_view(stroke=None)
        .configure_axis(
            labelColor="var(--ink-2)",
            titleColor="var(--ink-2)",
            gridColor="var(--line)",
            domainColor="var(--line)",
            tickColor="var(--line)",
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            titlePadding=8,
        )
        .configure_legend(
            labelColor="var(--ink-2)", labelFontSize=12, orient="top", title=None, offset=6
        )
    )
    return configured


def _states(facts: ReportFacts) -> Chart:
    rows = [
        {"state": state, "count": facts.status[state], "order": number}
        for number, state in enumerate(STATES)
        if facts.status[state]
    ]
    chart: alt.Chart = (
        alt.Chart(_data(rows), height=34, width="container")
        .mark_bar(size=26)
        .encode(
            x=alt.X("count:Q", stack="normalize", axis=None),
            color=_color("state", STATES, [row["state"] for row in rows], legend=False),
            order="order:Q",
            tooltip=[alt.Tooltip("state:N", title="State"), _number("count", "Sources")],
        )
    )
    return _described(chart, "Sources by state")


def _progress(facts: ReportFacts) -> Chart:
    points = [
        {
            "place": point.place,
            "sources": point.sources,
            "rows": point.rows,
            "when": time_text(point.at),
        }
        for point in facts.points
    ]
    most = max(facts.status.total, facts.points[-1].sources)
    tips = [
        alt.Tooltip("when:N", title="Time"),
        _number("sources", "Sources"),
        _number("rows", "Rows"),
    ]
    whole = alt.Scale(domain=[0, most], nice=False)
    base = alt.Chart(_data(points), height=_HEIGHT, width="container").encode(
        x=_time_axis(facts, "place"),
        y=alt.Y(
            "sources:Q", title="Sources completed", scale=whole, axis=_count_axis(), stack=None
        ),
    )
    area = base.mark_area(
        interpolate="step-after", color="var(--completed)", opacity=0.18, tooltip=False
    )
    line = base.mark_line(interpolate="step-after", color="var(--completed)", strokeWidth=2)
    hover = base.mark_circle(size=120, opacity=0, color="var(--completed)").encode(tooltip=tips)
    layers: list[Chart] = [area, line, hover]
    if facts.crashes:
        layers.insert(0, _crash_rules(facts))
        layers.append(_crash_signs(facts))
    return _described(alt.layer(*layers), "Sources completed over time; crashes are marked")


def _crash_data(facts: ReportFacts) -> dict[str, Any]:
    return _data(
        [
            {
                "place": crash.place,
                "run": middle_cut(crash.run.run_id),
                "outcome": crash.run.outcome,
                "when": time_text(crash.run.ended_at or 0.0),
                "lost": counted(crash.rows_lost, "row"),
            }
            for crash in facts.crashes
        ]
    )


def _crash_rules(facts: ReportFacts) -> alt.Chart:
    chart: alt.Chart = (
        alt.Chart(_crash_data(facts))
        .mark_rule(color="var(--failed)", strokeDash=[4, 3], strokeWidth=1.5)
        .encode(x=_time_axis(facts, "place"))
    )
    return chart


def _crash_signs(facts: ReportFacts) -> alt.Chart:
    tips = [
        alt.Tooltip("outcome:N", title="Run"),
        alt.Tooltip("when:N", title="Time"),
        alt.Tooltip("lost:N", title="Lost"),
        alt.Tooltip("run:N", title="Run id"),
    ]
    chart: alt.Chart = (
        alt.Chart(_crash_data(facts))
        .mark_point(
            shape="cross", size=150, angle=45, filled=True, color="var(--failed)", opacity=1
        )
        .encode(x=_time_axis(facts, "place"), y=alt.value(0), tooltip=tips)
    )
    return chart


def _throughput(facts: ReportFacts, rates: Sequence[float], noun: str, color: str) -> Chart:
    """Return the throughput over time, in the unit in which its highest value is a number."""
    highest = max(rates)
    seconds, unit = next((one for one in _PER if highest * one[0] >= 1), _PER[-1])
    title = f"{noun} {unit}"
    rows = [
        {"start": one.start, "end": one.end, "rate": rate * seconds, "when": time_text(one.at)}
        for one, rate in zip(facts.bins, rates, strict=True)
    ]
    chart: alt.Chart = (
        alt.Chart(_data(rows), height=150, width="container")
        .mark_bar(color=f"var({color})", binSpacing=1)
        .encode(
            x=_time_axis(facts, "start", bin="binned"),
            x2="end:Q",
            y=alt.Y("rate:Q", title=title, axis=_value_axis()),
            tooltip=[
                alt.Tooltip("when:N", title="From"),
                alt.Tooltip("rate:Q", title=title, format=",.3~r"),
            ],
        )
    )
    return _described(chart, f"{title}, over time")


def _runs(facts: ReportFacts) -> Chart:
    labels = unique(f"{time_text(run.started_at)[5:19]} {run.outcome}" for run in facts.runs)
    rows = [
        {
            "run": label,
            "outcome": run.outcome,
            "sources": run.sources_completed,
            "rows": run.rows_written,
            "took": duration(run.duration_s),
            "id": middle_cut(run.run_id),
            "host": middle_cut(run.host),
        }
        for label, run in zip(labels, facts.runs, strict=True)
    ]
    tips = [
        alt.Tooltip("outcome:N", title="Outcome"),
        _number("sources", "Sources"),
        _number("rows", "Rows written"),
        alt.Tooltip("took:N", title="Took"),
        alt.Tooltip("host:N", title="Host"),
        alt.Tooltip("id:N", title="Run id"),
    ]
    chart = _bars(rows, "run", "sources", "Sources completed by the run", _count_axis())
    color = _color("outcome", OUTCOMES, [run.outcome for run in facts.runs], legend=True)
    chart = chart.encode(color=color, tooltip=tips)
    return _described(chart, "Sources completed by each run, and how each run ended")


def _stages(facts: ReportFacts) -> Chart:
    labels = unique(middle_cut(stage.name) for stage in facts.stages)
    rows = [
        {"stage": label, "seconds": stage.udf_s, "time": span(stage.udf_s), "calls": stage.calls}
        for label, stage in zip(labels, facts.stages, strict=True)
    ]
    tips = [
        alt.Tooltip("stage:N", title="Stage"),
        alt.Tooltip("time:N", title="In the UDF"),
        _number("calls", "Calls"),
    ]
    chart = _bars(rows, "stage", "seconds", "Seconds in the UDF, over all workers")
    chart = chart.encode(color=alt.value("var(--accent)"), tooltip=tips)
    return _described(chart, "Seconds in the UDF of each stage")


def _slowest(facts: ReportFacts) -> Chart:
    labels = unique(middle_cut(slow.source_id) for slow in facts.slowest)
    rows = [
        {
            "source": label,
            "seconds": slow.seconds,
            "time": span(slow.seconds),
            "rows": slow.rows,
            "size": "unknown" if slow.size is None else file_size(slow.size),
        }
        for label, slow in zip(labels, facts.slowest, strict=True)
    ]
    tips = [
        alt.Tooltip("source:N", title="Source"),
        alt.Tooltip("time:N", title="Took"),
        _number("rows", "Rows"),
        alt.Tooltip("size:N", title="Size"),
    ]
    chart = _bars(rows, "source", "seconds", "Seconds from its read to its last row")
    chart = chart.encode(color=alt.value("var(--accent)"), tooltip=tips)
    return _described(chart, "The sources that took longest")


def _files(facts: ReportFacts) -> Chart:
    bins = () if facts.files is None else facts.files.bins
    rows = [{"size": f"{_power(low)} to {_power(high)}", "files": n} for low, high, n in bins]
    chart: alt.Chart = (
        alt.Chart(_data(rows), height=200, width="container")
        .mark_bar(color="var(--accent)")
        .encode(
            x=alt.X("size:O", title="Size of files", sort=None, axis=alt.Axis(labelAngle=-40)),
            y=alt.Y("files:Q", title="Files", axis=_count_axis()),
            tooltip=[alt.Tooltip("size:N", title="Size"), _number("files", "Files")],
        )
    )
    return _described(chart, "Output files by size")


def _power(size: int) -> str:
    """Return a power of two in bytes: "4 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            return f"{size} {unit}"
        size //= 1024
    return f"{size} PiB"


def _bars(
    rows: Rows, label: str, value: str, title: str, axis: alt.Axis | None = None
) -> alt.Chart:
    """Return horizontal bars in the order of ``rows``, with their labels beside them."""
    chart: alt.Chart = (
        alt.Chart(_data(rows), height=_ROW_HEIGHT * len(rows), width="container")
        .mark_bar(size=14, minBandSize=2)
        .encode(
            y=alt.Y(
                f"{label}:N",
                title=None,
                sort=None,
                axis=alt.Axis(
                    labelLimit=alt.ExprRef(_LABEL_LIMIT), domain=False, ticks=False, labelPadding=8
                ),
            ),
            x=alt.X(f"{value}:Q", title=title, axis=axis or _value_axis()),
        )
    )
    return chart


def _time_axis(facts: ReportFacts, field: str, **more: Any) -> alt.X:
    """Return the axis of all charts over time: the same everywhere."""
    scale = alt.Scale(domain=[0, facts.timeline.length], nice=False)
    title = facts.timeline.title
    return alt.X(f"{field}:Q", title=title, scale=scale, axis=_value_axis(), **more)


def _value_axis(**more: Any) -> alt.Axis:
    """Return an axis of numbers, which a thousands separator makes readable."""
    return alt.Axis(format=",~r", tickCount=5, ticks=False, domain=False, labelPadding=6, **more)


def _count_axis() -> alt.Axis:
    return _value_axis(tickMinStep=1)


def _number(field: str, title: str) -> alt.Tooltip:
    return alt.Tooltip(f"{field}:Q", title=title, format=",")


def _color(field: str, every: Sequence[str], present: Iterable[str], *, legend: bool) -> alt.Color:
    """Return the colors of states or outcomes, each by the variable of its name."""
    there = set(present)
    domain = [one for one in every if one in there]
    scale = alt.Scale(domain=domain, range=[f"var(--{one})" for one in domain])
    if legend:
        return alt.Color(f"{field}:N", scale=scale)
    return alt.Color(f"{field}:N", scale=scale, legend=None)


def _data(rows: Rows) -> dict[str, Any]:
    return {"values": list(rows)}


def _described(chart: Any, description: str) -> Chart:
    """Add what a screen reader says of a chart."""
    described: Chart = chart.properties(description=description)
    return described
