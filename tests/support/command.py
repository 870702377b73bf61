"""The `ray-resume` command, run in this process, in another one and on a terminal."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import time

import pytest

from ray_resume import cli

DEADLINE_S = 30.0


def run(*arguments: object, answer: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, without a terminal."""
    command = list(map(str, arguments))
    printed, told = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(answer or ""))
        patch.setattr(sys, "stdout", printed)
        patch.setattr(sys, "stderr", told)
        try:
            code = cli.main(command)
        except SystemExit as over:
            code = int(over.code or 0)
    texts = []
    for stream in (printed, told):
        stream.seek(0)
        texts.append(stream.read())
    return subprocess.CompletedProcess(command, code, *texts)


def run_alone(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, without a terminal."""
    command = [sys.executable, "-m", "ray_resume", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ray_resume", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Terminal:
    """The command with a terminal for all three of its streams."""

    def __init__(self, *arguments: object) -> None:
        self._fd, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ray_resume", *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            self.shown += os.read(self._fd, 4096).decode()

    def type(self, text: str) -> int:
        os.write(self._fd, text.encode())
        code = self.process.wait(DEADLINE_S)
        self.shown += os.read(self._fd, 65536).decode()
        os.close(self._fd)
        return code


def one_line(text: str) -> str:
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    assert text.startswith("ray-resume: ")
    return text
