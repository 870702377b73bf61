"""What large numbers of sources cost: planning, looking, the ledger, the store, the actor.

    python tests/benchmarks/scale.py plan [--sources 1000000]
    python tests/benchmarks/scale.py ledger [--sources 10000000] [--events 10]
    python tests/benchmarks/scale.py memory [--sources 1000000] [--events 10]
    python tests/benchmarks/scale.py actor [--senders 4] [--seconds 5]
    python tests/benchmarks/scale.py run [--sources 1000000] [--plain]

`plan` makes a checkpoint of a finished job, and does what a run that finds nothing to do does, but
for listing files; then what `status` does. `ledger` sends a message for every few sources, which
share a file, through the ledger's host into the store, without Ray. `memory` weighs what the host
keeps of sources that are pending or complete. `actor` has processes send messages to a real actor
until it is saturated. `run` is a whole job over tiny files, which share output files, and the same
job run again; with `--plain`, plain Ray Data does it too, beside it.
Each prints figures, as JSON. Timings of a shared machine drift by a factor of two.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from scale_actor import run_actor
from scale_job import job, run_run
from scale_ledger import run_ledger, run_memory
from scale_plan import plan, run_plan, status


def run_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """Be a process that `in_child` starts."""
    name, path, *more, count = arguments.rest
    if name == "plan":
        checkpoint, names = more
        return plan(Path(path), checkpoint, Path(names), int(count))
    if name == "status":
        return status(Path(path), int(count))
    return job(name, Path(path), int(count))


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, run, sources in (
        ("plan", run_plan, 1_000_000),
        ("ledger", run_ledger, 1_000_000),
        ("memory", run_memory, 200_000),
        ("actor", run_actor, 0),
        ("run", run_run, 1_000_000),
        ("part", run_part, 0),
    ):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--sources", type=int, default=sources)
        if name in ("ledger", "memory"):
            command.add_argument("--events", type=int, default=10)
        if name == "actor":
            command.add_argument("--senders", type=int, default=3)
            command.add_argument("--open", type=int, default=64)
            command.add_argument("--seconds", type=float, default=5)
            command.add_argument("--most", type=int, default=3_000_000)
        if name == "run":
            command.add_argument("--plain", action="store_true")
        if name == "part":
            command.add_argument("rest", nargs="*")
    arguments = parser.parse_args()
    print(json.dumps(arguments.run(arguments)))


if __name__ == "__main__":
    main()
