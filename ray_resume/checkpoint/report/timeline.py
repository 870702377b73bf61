"""`Timeline`: where moments are on the time axis of charts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Timeline"]

Times = npt.NDArray[np.float64]

# Pauses are cut out of the axis if they would take more of it than this.
_MOST_PAUSE = 0.5
_UNITS = ((3 * 86400.0, 86400.0, "days"), (2 * 3600.0, 3600.0, "hours"), (120.0, 60.0, "minutes"))


@dataclass(frozen=True)
class Timeline:
    """The time since the first run began; without the pauses between runs, if these prevail.

    Attributes:
        starts, ends: when work began and paused, in seconds since 1970; ascending and disjoint.
        is_cut: pauses are cut out.
        unit_s: the seconds in a unit of the axis, ``unit``: its name.
    """

    starts: Times
    ends: Times
    is_cut: bool
    unit_s: float
    unit: str

    @classmethod
    def of(cls, spans: Iterable[tuple[float, float]]) -> Timeline:
        """Make the axis of the spans in which runs were at work, in any order."""
        merged: list[tuple[float, float]] = []
        for start, end in sorted(spans):
            if merged and start <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(merged[-1][1], end)
            else:
                merged.append((start, end))
        starts, ends = np.array(merged, np.float64).reshape(-1, 2).T
        whole = float(ends[-1] - starts[0]) if merged else 0.0
        work = float((ends - starts).sum())
        is_cut = work < (1 - _MOST_PAUSE) * whole
        length = work if is_cut else whole
        for least, unit_s, unit in _UNITS:
            if length >= least:
                return cls(starts, ends, is_cut, unit_s, unit)
        return cls(starts, ends, is_cut, 1.0, "seconds")

    def __bool__(self) -> bool:
        return self.length > 0

    @property
    def length(self) -> float:
        """The length of the axis, in its unit."""
        return float(self.place(self.ends[-1:])[0]) if len(self.ends) else 0.0

    @property
    def title(self) -> str:
        """The title of the axis: its unit, and whether pauses are cut out."""
        if self.is_cut:
            return f"{self.unit} of work, pauses between runs left out"
        return f"{self.unit} since the first run"

    def place(self, moments: Times) -> Times:
        """Return where moments are on the axis, in its unit."""
        if not self.is_cut:
            first = self.starts[0] if len(self.starts) else 0.0
            return (moments - first) / self.unit_s
        worked = np.concatenate([[0.0], np.cumsum(self.ends - self.starts)])
        bounds = np.column_stack([self.starts, self.ends]).ravel()
        places = np.column_stack([worked[:-1], worked[1:]]).ravel()
        found: Times = np.interp(moments, bounds, places) / self.unit_s
        return found

    def moment(self, places: Times) -> Times:
        """Return a moment at each place on the axis: at a pause, its end."""
        if not self.is_cut:
            return places * self.unit_s + (self.starts[0] if len(self.starts) else 0.0)
        worked = np.concatenate([[0.0], np.cumsum(self.ends - self.starts)])
        span = np.clip(np.searchsorted(worked, places * self.unit_s, "right") - 1, 0, None)
        span = np.minimum(span, len(self.starts) - 1)
        found: Times = self.starts[span] + places * self.unit_s - worked[span]
        return found
