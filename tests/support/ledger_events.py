"""Events of a ledger, short to write: a kind, a source, its share of the sum."""

from __future__ import annotations

import copy
import enum
from typing import Any

from ray_resume.core.ledger import Ledger
from ray_resume.core.messages import Applied, Drain, Message, Outcome, ReadFailure, Seal
from ray_resume.core.parts import FilePart
from ray_resume.core.tokens import MODULUS

APPLIED, REPEATED, POISONED, ALREADY_COMPLETE = (
    Outcome.APPLIED,
    Outcome.REPEATED,
    Outcome.POISONED,
    Outcome.ALREADY_COMPLETE,
)
Event = Seal | Drain
AnyEvent = Seal | Drain | ReadFailure


def new_ledger(source_count: int = 3) -> Ledger:
    ledger = Ledger("run", source_count)
    ledger.begin_pass(1)
    return ledger


def send(ledger: Ledger, *events: AnyEvent, pass_number: int = 1) -> Applied:
    return ledger.apply(Message("run", pass_number, events))


def state(ledger: Ledger) -> Any:
    """Everything a ledger knows, in depth and detached from it."""
    return plain(copy.deepcopy(ledger))


def plain(value: Any) -> Any:
    """A value as containers and scalars that compare by what is in them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(
        value, (bool, int, float, str, bytes, bytearray, set, enum.Enum)
    ):
        return value
    slots = getattr(value, "__slots__", None) or vars(value)
    return {name: plain(getattr(value, name)) for name in slots}


def minus(value: int) -> int:
    return -value % MODULUS


def parts(*files: str) -> tuple[FilePart, ...]:
    """A part of two rows in each of some files of four."""
    return tuple(FilePart(file, 1, 2, 4) for file in files)
