"""Who is alive, whatever happens to the processes of a run: real forks, real SIGKILL, a model.

The model knows which processes hold which lease. Never may a lease look free while one of them is
alive, stopped or not; and it looks free once all of them are dead, whichever children they left.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.lease import Lease, live_runs
from ray_resume.errors import CheckpointError

pytestmark = pytest.mark.long


class Process:
    """A forked process that takes leases and has children, as it is asked to."""

    def __init__(self, folder: Path) -> None:
        commands, self._commands = os.pipe()
        self._replies, replies = os.pipe()
        self.pid = os.fork()
        self.run: int | None = None
        self.left_child = False
        if self.pid == 0:
            try:
                _serve(folder, commands, replies)
            finally:
                os._exit(0)
        os.close(commands)
        os.close(replies)

    def ask(self, command: str) -> str:
        os.write(self._commands, command.encode())
        return os.read(self._replies, 100).decode()

    def kill(self, *, reap: bool) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | (0 if reap else os.WNOWAIT))

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.kill(reap=True)
        os.close(self._commands)
        os.close(self._replies)


def _serve(folder: Path, commands: int, replies: int) -> None:
    leases = []
    while command := os.read(commands, 100).decode():
        what, _, run = command.partition(" ")
        reply = "done"
        try:
            if what == "acquire":
                leases.append(Lease.acquire(folder, Owner.here(run), Claim(None), wait_s=0))
            elif what == "join":
                leases.append(Lease.join(folder / f"{run}.lease"))
            elif what == "release":
                leases.pop().release()
            else:
                child = os.fork() if what == "python" else ctypes.PyDLL(None).fork()
                if child == 0:
                    while True:
                        signal.pause()
                reply = str(child)
        except CheckpointError:
            reply = "refused"
        os.write(replies, reply.encode())


class Runs(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-resume-leases-"))
        self.processes: list[Process] = []
        self.children: list[int] = []
        self.stopped: set[int] = set()
        self.zombies: list[Process] = []
        self.number = 0
        # Which processes have ever held the last run's lease.
        self.holders: list[Process] = []

    def holding(self) -> list[Process]:
        return [one for one in self.processes if one.run == self.number]

    def able(self) -> list[Process]:
        return [one for one in self.holding() if one.pid not in self.stopped]

    @precondition(lambda self: len(self.processes) < 4)
    @rule()
    def start_run(self) -> None:
        process = Process(self.folder)
        self.processes.append(process)
        free = not live_runs(self.folder)
        answer = process.ask(f"acquire {self.number + 1}")
        assert (answer == "done") == free
        if free:
            self.number += 1
            process.run = self.number
            self.holders = [process]

    @precondition(lambda self: len(self.processes) < 4)
    @rule()
    def join_run(self) -> None:
        process = Process(self.folder)
        self.processes.append(process)
        alive = bool(self.holding())
        if process.ask(f"join {self.number}") == "done":
            assert str(self.number) in live_runs(self.folder)
            process.run = self.number
            self.holders.append(process)
        else:
            assert not alive

    @precondition(lambda self: self.able())
    @rule(how=st.sampled_from(["python", "C"]), data=st.data())
    def fork_child(self, how: str, data: st.DataObject) -> None:
        process = data.draw(st.sampled_from(self.able()))
        self.children.append(int(process.ask(how)))
        process.left_child |= how == "C"

    @precondition(lambda self: self.able())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        process = data.draw(st.sampled_from(self.able()))
        assert process.ask("release") == "done"
        process.run, process.left_child = None, False

    @precondition(lambda self: self.able())
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        process = data.draw(st.sampled_from(self.able()))
        os.kill(process.pid, signal.SIGSTOP)
        self.stopped.add(process.pid)

    @precondition(lambda self: self.processes)
    @rule(reap=st.booleans(), data=st.data())
    def kill(self, reap: bool, data: st.DataObject) -> None:
        process = data.draw(st.sampled_from(self.processes))
        process.kill(reap=reap)
        self.processes.remove(process)
        self.stopped.discard(process.pid)
        if reap:
            process.end()
        else:
            # Its number stays taken for as long as nobody asks for it.
            self.zombies.append(process)

    @invariant()
    def is_judged_by_the_living(self) -> None:
        live = live_runs(self.folder)
        assert not live.keys() - {str(self.number)}
        if self.holding():
            assert str(self.number) in live
        elif len(self.holders) <= 2 and not set(self.holders) & set(self.processes):
            assert not live, "all that ever held it are dead"
        elif not any(one.left_child for one in self.holders):
            assert not live, "only children that Python forked are left"

    def teardown(self) -> None:
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
        for process in [*self.processes, *self.zombies]:
            process.end()
        shutil.rmtree(self.folder)


TestRuns = Runs.TestCase
TestRuns.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
