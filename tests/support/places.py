"""Where the repository's own files are."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
SCRIPTS = TESTS / "drivers"

# Every folder of tests: what they define must be importable in workers, too.
PATHS = [str(TESTS), *sorted(str(path) for path in TESTS.rglob("*") if any(path.glob("*.py")))]
