"""The structure that the documentation promises: imports point one way, heavy ones come late."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import ray_resume

PACKAGE = Path(ray_resume.__file__).parent

# From the user's end to the ground; a module imports only from modules that stand below it.
ORDER = [
    "__main__",
    "cli",
    "testing",
    "__init__",
    "write",
    "read",
    "run",
    "schedule",
    "signals",
    "todo",
    "output",
    "datasinks",
    "sink",
    "packing",
    "gather",
    "formats",
    "stage",
    "rows",
    "calls",
    "failures",
    "datasource",
    "readings",
    "plan",
    "batches",
    "client",
    "actor",
    "checkpoint",
    "checkup",
    "report",
    "compaction",
    "storage",
    "shared",
    "shared_writer",
    "shared_lease",
    "directory",
    "contents",
    "reader",
    "store",
    "shard",
    "lease",
    "ledger",
    "shelf",
    "notes",
    "letters",
    "pending",
    "filelist",
    "folder",
    "union",
    "table",
    "listing",
    "source",
    "digests",
    "mounts",
    "segment",
    "record",
    "naming",
    "heartbeat",
    "bakery",
    "objects",
    "lineage",
    "summary",
    "errors",
    "faults",
]

# Who may import what is not ours: the rest must not know that it exists.
RESERVED = {
    "lmdb": {"store"},
    "fcntl": {"lease"},
    "ray": {
        "write",
        "read",
        "run",
        "datasinks",
        "sink",
        "gather",
        "formats",
        "datasource",
        "readings",
        "plan",
        "batches",
        "client",
        "actor",
    },
}


def imports_of(module: str) -> set[str]:
    """Return what ``module`` imports anywhere: our modules by their name, others by their root."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            root, _, rest = node.module.partition(".")
            if root == "ray_resume":
                found |= {rest} if rest else {name.name for name in node.names}
            else:
                found.add(root)
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
    return found


def test_every_module_has_a_place() -> None:
    assert sorted(path.stem for path in PACKAGE.glob("*.py")) == sorted(ORDER)


def test_imports_point_down() -> None:
    upward = [
        f"{module} imports {imported}"
        for position, module in enumerate(ORDER)
        for imported in imports_of(module)
        if imported in ORDER[: position + 1]
    ]
    assert upward == []


def test_what_is_reserved_stays_in_its_modules() -> None:
    for library, allowed in RESERVED.items():
        users = {module for module in ORDER if library in imports_of(module)}
        assert users <= allowed, library
    internals = {
        module for module in ORDER if "ray.data._internal" in (PACKAGE / f"{module}.py").read_text()
    }
    assert internals == {"plan"}


def test_looking_at_a_checkpoint_loads_neither_ray_nor_pyarrow_datasets(tmp_path: Path) -> None:
    script = (
        "import sys, ray_resume\n"
        "from ray_resume.directory import CheckpointDirectory\n"
        f"CheckpointDirectory({str(tmp_path)!r}).ensure()\n"
        f"ray_resume.Checkpoint({str(tmp_path)!r}).status()\n"
        "print([name for name in ('ray', 'pyarrow.dataset', 'pandas') if name in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_every_public_name_is_there() -> None:
    for name in ray_resume.__all__:
        assert getattr(ray_resume, name) is not None
