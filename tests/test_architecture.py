"""The structure that CONTRIBUTING.md promises: a rule for each package, no cycles."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
from children import run_python

import ray_resume

PACKAGE = Path(ray_resume.__file__).parent

# What each package may import of ours, beside itself. "a" means every module in and below a.
GROUND = {"errors", "failpoints", "files", "filesystems"}
PACKAGES: dict[str, set[str]] = {
    "core": {"errors"},
    "checkpoint": {"core", *GROUND},
    "run": {"core", "checkpoint", *GROUND},
    "raydata": {"core", "errors"},
    "read": {"core", "raydata", "run.client", *GROUND},
    "udf": {"core", "raydata", "run.client", *GROUND},
    "write": {"core", "raydata", "run.client", "run.output", *GROUND},
}

# Modules that put the parts together may import more than the rest of their package.
EXTRA: dict[str, set[str]] = {
    "read.resumable_read": {"checkpoint"},
    # To rebind a checkpoint is to look at its output folder.
    "checkpoint.rebinding": {"write.folder"},
    "checkpoint.checkpoint": {"write.folder", "write.tidying"},
    "checkpoint.view": {"write.folder"},
    # They commit records, in the driver.
    "write.retyping": {"checkpoint"},
    "write.rewriter": {"checkpoint"},
    "write.tidying": {"checkpoint"},
    # It verifies and cleans the folder, in the driver.
    "write.output": {"checkpoint"},
    # They put the parts of a pipeline together, in the driver.
    "write.targets": {
        "checkpoint.backend",
        "read",
        "run.pass_loop",
        "run.table",
        "udf.decorator",
    },
    "write.execution": {
        "checkpoint.backend",
        "read.datasource",
        "read.row_input",
        "run",
        "udf.stage",
    },
    "write.resumable_write": {"read.datasource", "run.summary", "udf.decorator"},
}

# Modules outside of the packages: the user's end, and the ground.
TOP: dict[str, set[str]] = {
    "__main__": {"cli"},
    "cli": {"__init__", "checkpoint", "console", "core.wording", *GROUND},
    "console": {"checkpoint", "core.wording"},
    "testing": {"checkpoint", "core", *GROUND},
    "__init__": {"checkpoint", "core.stages", "errors", "read", "run", "udf", "write"},
    "errors": set(),
    "failpoints": set(),
    "files": set(),
    "filesystems": {"errors", "files"},
}

# Which modules may import what is not ours: the rest must not know that it exists.
RESERVED = {
    "lmdb": {"checkpoint.local.lmdb_file"},
    "fcntl": {"checkpoint.local.file_lock"},
    "ray": {"raydata", "read", "run", "write"},
    "altair": {"checkpoint.report"},
    "jinja2": {"checkpoint.report"},
    "vl_convert": {"checkpoint.report"},
}
PURE_FROM = {"lmdb", "fcntl", "ray", "threading", "time", "logging", "socket", "asyncio"}
WITHOUT_RAY_DATA = {"run"}


# Lines; those of functions without blank ones, comments and docstrings.
LONGEST_FUNCTION, LONGEST_CLASS, LONGEST_MODULE = 60, 250, 450


@functools.cache
def modules() -> tuple[str, ...]:
    """Return every module by its dotted name in the package."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    names = (".".join(path.parts) for path in paths)
    return tuple(sorted(name.removesuffix(".__init__") if "." in name else name for name in names))


def path_of(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def is_in(module: str, owners: set[str]) -> bool:
    return any(module == owner or module.startswith(f"{owner}.") for owner in owners)


@functools.cache
def imports_of(module: str) -> set[str]:
    """Return the modules that ``module`` imports anywhere; ours without their root."""
    found = set()
    for node in ast.walk(ast.parse(path_of(module).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.partition(".")[0] != "ray_resume":
                found.add(node.module)
                continue
            base = node.module.partition(".")[2]
            for name in node.names:
                whole = f"{base}.{name.name}" if base else name.name
                found.add(whole if path_of(whole).exists() else base or "__init__")
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def ours(module: str) -> set[str]:
    every = set(modules())
    return {imported for imported in imports_of(module) if imported in every} - {module}


@pytest.mark.long
def test_each_package_keeps_its_rule() -> None:
    broken = []
    for module in modules():
        package = module.partition(".")[0]
        own = TOP[module] if module in TOP else {package, *PACKAGES[package]}
        allowed = own | EXTRA.get(module, set())
        others = sorted(ours(module))
        broken += [f"{module} imports {o}" for o in others if not is_in(o, allowed)]
    assert broken == []


def test_no_exception_outlives_its_need() -> None:
    for module, extra in EXTRA.items():
        for allowed in extra:
            assert any(is_in(other, {allowed}) for other in ours(module)), (module, allowed)


@pytest.mark.long
def test_imports_make_no_cycle() -> None:
    left = {module: ours(module) for module in modules()}
    while ready := {module for module, needed in left.items() if not needed & left.keys()}:
        for module in ready:
            del left[module]
    assert left == {}


@pytest.mark.long
def test_what_is_reserved_stays_in_its_modules() -> None:
    for library, allowed in RESERVED.items():
        users = {m for m in modules() if library in {i.partition(".")[0] for i in imports_of(m)}}
        assert {user for user in users if not is_in(user, allowed)} == set(), library
    internals = {m for m in modules() if "ray.data._internal" in path_of(m).read_text()}
    assert {module for module in internals if not is_in(module, {"raydata"})} == set()
    for module in modules():
        roots = {imported.partition(".")[0] for imported in imports_of(module)}
        if is_in(module, {"core"}):
            assert not roots & PURE_FROM, module
        if is_in(module, WITHOUT_RAY_DATA):
            assert not any(is_in(i, {"ray.data"}) for i in imports_of(module)), module


@pytest.mark.long
def test_nothing_is_too_long() -> None:
    found = []
    for module in modules():
        text = path_of(module).read_text()
        lines = text.splitlines()
        found += [(module, len(lines))] if len(lines) > LONGEST_MODULE else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                length, most = 1 + (node.end_lineno or 0) - node.lineno, LONGEST_CLASS
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                first, last = (body[0].lineno, body[-1].end_lineno) if body else (1, 0)
                code = [line.strip() for line in lines[first - 1 : last]]
                length = sum(bool(line) and not line.startswith("#") for line in code)
                most = LONGEST_FUNCTION
            else:
                continue
            found += [(f"{module}.{node.name}", length)] if length > most else []
    assert found == []


def test_each_package_says_what_it_is() -> None:
    for package in {module.rpartition(".")[0] for module in modules()} - {""}:
        tree = ast.parse(path_of(package).read_text())
        docstring = ast.get_docstring(tree)
        assert docstring is not None, package
        assert "Runs in:" in docstring, package
        assert len(tree.body) == 1, package


def test_looking_at_a_checkpoint_loads_neither_ray_nor_pyarrow_datasets(tmp_path: Path) -> None:
    script = (
        "import sys, ray_resume\n"
        "from ray_resume.checkpoint.local.backend import LocalBackend\n"
        f"LocalBackend({str(tmp_path)!r}).ensure()\n"
        f"ray_resume.Checkpoint({str(tmp_path)!r}).status()\n"
        "print([name for name in ('ray', 'pyarrow.dataset', 'pandas') if name in sys.modules])\n"
    )
    result = run_python(script, check=True)
    assert result.stdout == "[]\n"


def test_copying_rows_of_files_loads_no_ray() -> None:
    script = (
        "import sys\n"
        "import ray_resume.write.formats, ray_resume.write.folder, ray_resume.write.row_copies\n"
        "print([name for name in ('ray', 'lmdb', 'pandas') if name in sys.modules])\n"
    )
    result = run_python(script, check=True)
    assert result.stdout == "[]\n"


def test_what_workers_import_loads_no_lmdb() -> None:
    script = (
        "import sys\n"
        "import ray_resume.read.datasource, ray_resume.read.inputs, ray_resume.udf.stage\n"
        "import ray_resume.write.file_sink, ray_resume.write.datasinks\n"
        "import ray_resume.write.rewrite_tasks\n"
        "print([name for name in ('lmdb', 'ray_resume.checkpoint') if name in sys.modules])\n"
    )
    result = run_python(script, check=True)
    assert result.stdout == "[]\n"


def test_every_public_name_is_there() -> None:
    for name in ray_resume.__all__:
        assert getattr(ray_resume, name) is not None
