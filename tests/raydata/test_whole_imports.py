"""An import that is interrupted leaves nothing behind that breaks the next one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_resume.raydata.whole_imports import import_whole

# As in `lance`: two modules that import each other. An interrupt comes in the middle.
OUTER = """
from . import inner
import _thread, sys, time
if not hasattr(sys, "interrupted_once"):
    sys.interrupted_once = True
    _thread.interrupt_main()
    time.sleep(0.3)
NAME = "outer"
"""
INNER = "from . import outer\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "half_made"
    (tmp_path / name).mkdir()
    for module, text in (("__init__", ""), ("outer", OUTER), ("inner", INNER)):
        (tmp_path / name / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "interrupted_once", True, raising=False)
    monkeypatch.delattr(sys, "interrupted_once")
    for module in [loaded for loaded in sys.modules if loaded.startswith(name)]:
        monkeypatch.delitem(sys.modules, module)
    return name


@pytest.mark.parametrize(
    ("import_it", "is_whole"), [(importlib.import_module, False), (import_whole, True)]
)
def test_an_interrupt_leaves_no_half_of_a_package(
    package: str, import_it: Callable[[str], object], is_whole: bool
) -> None:
    with pytest.raises(KeyboardInterrupt):
        import_it(f"{package}.outer")
    importlib.import_module(f"{package}.outer")
    inner = importlib.import_module(f"{package}.inner")
    assert hasattr(inner.outer, "NAME") == is_whole


def test_what_is_missing_is_left_to_those_who_need_it() -> None:
    import_whole("no_such_module", "json")
    import_whole()
