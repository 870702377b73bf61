"""A bar on the terminal that stands above those of Ray Data.

Internals of Ray's that are used: the manager of ``ray.experimental.tqdm_ray``, which gives each
group of bars its lines. Where it is not as it is known, there is no bar, and the log has the lines.
"""

from __future__ import annotations

import sys
import uuid
from typing import Any

from ray.data import DataContext

__all__ = ["Bar", "has_bars"]

_FORMAT = "{desc}: {percentage:3.0f}%|{bar:20}| {n:,}/{total:,} sources{postfix}"


def has_bars(context: DataContext) -> bool:
    """Say whether Ray Data shows bars by tqdm here: on a terminal, and no other kind of bar."""
    try:
        from ray.experimental import tqdm_ray

        bars: Any = tqdm_ray
        # Ray goes without, if tqdm is not installed.
        known = bars.real_tqdm, bars._BarManager._update_offsets, bars._BarGroup.allocate_bar
    except (ImportError, AttributeError):
        return False
    is_terminal = sys.stdout.isatty() and sys.stderr.isatty()
    return all(known) and context.use_ray_tqdm and is_terminal


class Bar:
    """A bar of ``total`` sources."""

    def __init__(self, title: str, total: int) -> None:
        from ray.experimental import tqdm_ray

        bars: Any = tqdm_ray
        self._manager: Any = bars.instance()
        self._key = ("ray_resume", uuid.uuid4().hex)
        self._state = {
            "uuid": self._key[1],
            "x": 0,
            "pos": 0,
            "desc": title,
            "total": total,
            "unit": "source",
        }
        with self._manager.lock:
            group = bars._BarGroup(*self._key, 0)
            group.allocate_bar(self._state)
            self._bar = group.bars_by_uuid[self._key[1]].bar
            self._bar.bar_format = _FORMAT
            # The first group has the first lines.
            groups = dict(self._manager.bar_groups)
            self._manager.bar_groups.clear()
            self._manager.bar_groups.update({self._key: group, **groups})
            self._manager._update_offsets()

    def show(self, done: int, text: str) -> None:
        """Show how many sources are ``done``, and ``text`` behind that."""
        with self._manager.lock:
            self._bar.n = done
            self._bar.set_postfix_str(text, refresh=True)

    def close(self) -> None:
        """Leave the last line on the terminal."""
        with self._manager.lock:
            group = self._manager.bar_groups.pop(self._key, None)
            if group is not None:
                self._bar.close()
                self._manager._update_offsets()
