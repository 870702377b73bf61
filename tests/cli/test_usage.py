"""Arguments that make no sense, checkpoints that are missing or damaged, help, and completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import one_line, run

import ray_resume
from ray_resume import cli
from ray_resume.core.wording import counted

pytestmark = pytest.mark.long
COMMANDS = ("status", "sources", "runs", "files", "parts", "reset", "compact", "tidy", "check")
NEEDED = {"reset": ["--source", "a"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_checkpoint(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, str(tmp_path / "no\nne"), *NEEDED.get(command, [])]
    assert cli.main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "There is no checkpoint at" in one_line(said.err)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("check", "runs")])
def test_a_damaged_checkpoint(path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = (path / "run2.mdb").read_bytes()
    (path / "run2.mdb").write_bytes(data[:4096])
    assert cli.main([command, str(path), *NEEDED.get(command, [])]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "run2.mdb" in one_line(said.err)


def test_a_checkpoint_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "ftp://host/ckpt"]) == 1
    one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate", "x"],
        ["status"],
        ["status", "x", "--jsn"],
        ["status", "x", "--js"],
        ["status", "x", "--interval", "soon"],
        ["status", "x", "--interval", "0"],
        ["sources", "x", "--state", "pending"],
        ["files", "x", "--json", "-0"],
        ["reset", "x"],
        ["reset", "x", "--yes"],
        ["reset", "x", "--state", "failed", "--source", "a"],
        ["reset", "x", "--state", "failed", "--dead-letters"],
        ["sources", "x", "--state"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as over:
        cli.main(arguments)
    assert over.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "--help" in one_line(said.err)


def test_help_and_version() -> None:
    result = run("--help")
    assert result.returncode == 0
    for command in COMMANDS:
        assert command in result.stdout
        assert run(command, "--help").returncode == 0
    assert run("--version").stdout == f"ray-resume {ray_resume.__version__}\n"


def test_shells_complete_commands_and_options(path: Path) -> None:
    def complete(words: str, number: int) -> list[str]:
        result = subprocess.run(
            [sys.executable, "-m", "ray_resume"],
            capture_output=True,
            text=True,
            check=True,
            env={
                **os.environ,
                "_RAY_RESUME_COMPLETE": "bash_complete",
                "COMP_WORDS": words,
                "COMP_CWORD": str(number),
            },
        )
        return [line.partition(",")[2] for line in result.stdout.splitlines()]

    assert complete("ray-resume s", 1) == ["status", "sources"]
    assert complete(f"ray-resume reset {path} --state q", 4) == ["quarantined"]
    assert "--fail-if-incomplete" in complete(f"ray-resume status {path} --", 3)


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (12345, "12,345 rows")]
)
def test_nouns_agree_with_their_number(number: int, text: str) -> None:
    assert counted(number, "row") == text
