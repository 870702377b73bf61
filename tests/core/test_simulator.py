"""Random and exhaustive histories of whole pipelines, on the shipped token and ledger code.

Set the seed that a failure prints into ``simulate(seed, faults)`` to see its history again.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable

import numpy as np
import pytest
from simulator import (
    CALM,
    DAMAGED,
    HARSH,
    LOSSES,
    RETRIES,
    RUN,
    Careless,
    Delivery,
    Faults,
    History,
    Kind,
    Made,
    Operator,
    Overlapping,
    PassRun,
    Pipeline,
    Plain,
    Positional,
    Sent,
    Shipped,
    Stage,
    Truth,
    first_wrong,
    random_pipeline,
    simulate,
)

from ray_resume.core import tokens
from ray_resume.core.ledger import Ledger
from ray_resume.core.messages import Drain, Message, Seal
from ray_resume.core.parts import FilePart
from ray_resume.core.tokens import MODULUS

pytestmark = pytest.mark.long

EACH = 1_500
FAULTS = {"calm": CALM, "retries": RETRIES, "losses": LOSSES, "harsh": HARSH, "damaged": DAMAGED}
READ = Operator()
WRITE = Operator(writes=True)


def run_histories(seeds: Iterable[int], faults: Faults) -> History:
    total = History()
    for seed in seeds:
        history = simulate(seed, faults)
        assert not history.wrong, f"simulate({seed}, {faults}): {history.wrong}"
        assert not history.stuck, f"simulate({seed}, {faults}): {history.stuck}"
        total.add(history)
    return total


# The shipped protocol ----------------------------------------------------------------------------


def test_without_faults_every_source_completes_in_the_first_pass() -> None:
    total = run_histories(range(EACH), CALM)
    assert total.undisturbed == total.sources > EACH
    assert total.pending == 0


# Each kind of history must be among them, or nothing was shown: hence the lower bounds.


def test_retries_as_ray_makes_them() -> None:
    total = run_histories(range(EACH), RETRIES)
    assert total.mixed_tasks > EACH / 5
    assert total.completed_although_disturbed > EACH / 5
    assert total.pending > EACH / 10
    assert total.undisturbed > EACH


def test_lost_and_late_messages() -> None:
    total = run_histories(range(EACH), LOSSES)
    assert total.refused > EACH / 5  # what came late, in another pass
    assert total.pending > EACH / 5


def test_any_mixture_of_executions() -> None:
    total = run_histories(range(EACH), HARSH)
    assert total.mixed_tasks > EACH
    assert total.completed_although_disturbed > EACH / 5
    assert total.pending > EACH / 5


def test_sources_that_cannot_be_read_never_complete() -> None:
    total = run_histories(range(EACH), DAMAGED)
    assert total.unread > EACH / 5
    # A retry of the task could read them.
    assert total.completed_although_disturbed > EACH / 20


def test_a_seal_in_spite_of_an_error_loses_rows() -> None:
    assert first_wrong(200, DAMAGED, Careless) is not None


@pytest.mark.slow
@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_many_histories(faults: Faults) -> None:
    run_histories(range(1_000_000, 1_025_000), faults)


# Small pipelines, exhaustively -------------------------------------------------------------------

# The number of messages decides the cost: the orders of 7 are 5,040.
SMALL = {
    "rows straight to three writes": Pipeline((6,), (READ, WRITE), block_rows=2, blocks_per_task=1),
    "two sources in each write": Pipeline((3, 3), (READ, WRITE), block_rows=2, blocks_per_task=1),
    "everything fused, an empty source": Pipeline(
        (3, 0, 2), (Operator((Stage(Kind.FAN_OUT, whole=True),), writes=True),), sources_per_read=1
    ),
    "fan-outs": Pipeline(
        (4, 3),
        (READ, Operator((Stage(Kind.FAN_OUT), Stage(Kind.GENERATOR, whole=True))), WRITE),
        block_rows=3,
    ),
    "filters": Pipeline(
        (5, 4),
        (READ, Operator((Stage(Kind.KEEP), Stage(Kind.FILTER, batch_rows=2, whole=True))), WRITE),
        block_rows=3,
    ),
    "flushes of one row, of three": Pipeline(
        (2, 3, 0, 2),
        (READ, WRITE),
        block_rows=4,
        blocks_per_task=2,
        sources_per_read=4,
        flush_rows=3,
    ),
    "a file for each source": Pipeline(
        (2, 3), (READ, WRITE), blocks_per_task=1, file_per_source=True
    ),
    "everything dropped": Pipeline((5, 2), (Operator((Stage(Kind.DROP_ALL, 2),)), WRITE)),
}


def small_passes(pipeline: Pipeline) -> list[PassRun]:
    """Give a few passes of up to 6 messages, with all their UDFs' luck."""
    runs = [
        PassRun(pipeline, range(len(pipeline.rows)), 1, Shipped(), CALM, random.Random(seed))
        for seed in range(12)
    ]
    few = [run for run in runs if len(run.sent) <= 6]
    assert few
    return sorted(few, key=lambda run: -len(run.sent))[:4]


def deliver(run: PassRun, sent: Iterable[Sent], source_count: int) -> Ledger:
    ledger = Ledger(RUN, source_count)
    ledger.begin_pass(1)
    delivery = Delivery(run.truth, ledger, Shipped())
    for one in sent:
        delivery.give(one)
    assert not delivery.wrong
    return ledger


@pytest.mark.parametrize("name", SMALL)
def test_every_order_completes_each_source_at_its_last_message(name: str) -> None:
    pipeline = SMALL[name]
    count = len(pipeline.rows)
    for run in small_passes(pipeline):
        for order in itertools.permutations(run.sent):
            ledger = Ledger(RUN, count)
            ledger.begin_pass(1)
            delivery = Delivery(run.truth, ledger, Shipped())
            for position, sent in enumerate(order):
                delivery.give(sent)
                to_come = set().union(*(late.sources() for late in order[position + 1 :]))
                heard_of = set().union(*(done.sources() for done in order[: position + 1]))
                assert delivery.completed == heard_of - to_come
            assert not delivery.wrong
            assert ledger.pending() == []


@pytest.mark.parametrize("name", SMALL)
def test_every_set_of_lost_messages_leaves_their_sources_pending(name: str) -> None:
    pipeline = SMALL[name]
    for run in small_passes(pipeline):
        for size in range(len(run.sent) + 1):
            for lost in itertools.combinations(run.sent, size):
                ledger = deliver(run, (s for s in run.sent if s not in lost), len(pipeline.rows))
                of_lost = set().union(*(sent.sources() for sent in lost))
                assert set(ledger.pending()) == of_lost


@pytest.mark.parametrize("faults", [RETRIES, HARSH], ids=["retries", "harsh"])
def test_every_order_of_a_pass_with_mixed_executions(faults: Faults) -> None:
    tried = completed = 0
    for seed in range(400):
        rng = random.Random(seed)
        pipeline = random_pipeline(rng)
        sources = range(len(pipeline.rows))
        run = PassRun(pipeline, sources, 1, Shipped(), faults, rng)
        if run.mixed_tasks == 0 or not 3 <= len(run.sent) <= 6:
            continue
        tried += 1
        for order in itertools.permutations(run.sent):
            pending = set(deliver(run, order, len(sources)).pending())
            assert pending <= run.disturbed
            completed += len(set(sources) & run.disturbed - pending)
    assert tried > 10
    assert completed > 0


def test_every_choice_between_the_outputs_of_two_executions() -> None:
    """Of 2 x 3 outputs of a shuffling UDF, only the two whole executions complete the source."""
    read = tokens.tokens(tokens.read_nonce(RUN, 1, "a"), 0, 6)
    sources = np.zeros(6, dtype=np.int32)
    executions = []
    for _ in range(2):
        call = tokens.CallAccount(sources, read)
        outputs = [call.emit(sources[:2]), call.emit(sources[:2]), call.finish(sources[:2])[0]]
        executions.append(drains_of(*outputs))
    deltas = [delta for execution in executions for delta in execution]
    for size in range(len(deltas) + 1):
        for chosen in itertools.combinations(deltas, size):
            whole = any(set(chosen) == set(execution) for execution in executions)
            assert completes_when_sealed(chosen, tokens.token_sum(read)) == whole


def test_rows_with_their_own_tokens_may_come_from_two_executions_of_the_read() -> None:
    nonce = tokens.read_nonce(RUN, 1, "a")
    first, second = tokens.tokens(nonce, 0, 5), tokens.tokens(nonce, 0, 5)
    total = tokens.token_sum(first)
    for taken in range(1, 4):
        assert completes_when_sealed(drains_of(first[:taken], second[taken:]), total)
        assert not completes_when_sealed(drains_of(first[: taken + 1], second[taken:]), total)
        assert not completes_when_sealed(drains_of(first[:taken], second[taken + 1 :]), total)


def drains_of(*parts: tokens.TokenArray) -> list[int]:
    return [-tokens.token_sum(part) % MODULUS for part in parts]


def completes_when_sealed(deltas: Iterable[int], total: int) -> bool:
    """Drain ``deltas``, then seal: so that nothing completes before everything has arrived."""
    ledger = Ledger(RUN, 1)
    ledger.begin_pass(1)
    ledger.apply(Message(RUN, 1, tuple(Drain(0, delta) for delta in deltas)))
    return bool(ledger.apply(Message(RUN, 1, (Seal(0, total),))).completions)


# The simulator can fail --------------------------------------------------------------------------


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_plain_counters_complete_too_early(faults: Faults) -> None:
    assert first_wrong(200, faults, Plain) is not None


@pytest.mark.parametrize("faults", [RETRIES, LOSSES, HARSH], ids=["retries", "losses", "harsh"])
def test_positional_tokens_let_mixtures_pass(faults: Faults) -> None:
    assert first_wrong(1_000, faults, Positional) is not None


@pytest.mark.parametrize("faults", [RETRIES, LOSSES, HARSH], ids=["retries", "losses", "harsh"])
def test_parts_of_a_source_that_was_divided_otherwise_do_not_count(faults: Faults) -> None:
    assert first_wrong(1_000, faults, Overlapping) is not None


def test_positional_tokens_are_right_while_nothing_is_executed_again() -> None:
    assert first_wrong(300, CALM, Positional) is None


@pytest.mark.parametrize("faults", [RETRIES, HARSH], ids=["retries", "harsh"])
def test_shares_that_are_not_drawn_anew_let_mixtures_pass(
    faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "fresh_nonce", lambda: 1)
    assert first_wrong(1_000, faults) is not None


def test_the_truth_tells_what_is_wrong() -> None:
    truth = Truth()

    def fault(*files: list[int], dropped: Iterable[Made] = ()) -> str | None:
        parts = [FilePart(truth.write(units), 0, len(units), len(units)) for units in files]
        return truth.fault(0, parts, [*dropped])

    rows = truth.read(0, 3, steady=True)
    assert fault(rows) is None
    assert fault(rows[:2]) == "rows are missing"
    assert fault() == "rows are missing"
    assert fault(rows, rows[2:]) == "rows are there twice"
    # Another source's rows may be in the same file, and are in no part.
    file = truth.write([truth.unit(), *rows])
    assert truth.fault(0, [FilePart(file, 1, 3, 4)], []) is None
    assert truth.fault(0, [FilePart(file, 0, 3, 4)], []) == "rows are missing"

    first, second = truth.made(0, rows), truth.made(0, rows)
    first.outputs += [truth.unit(), truth.unit()]
    second.outputs += [truth.unit(), truth.unit()]
    assert fault(first.outputs) is None
    assert fault(first.outputs, second.outputs) == "rows are there twice"
    assert fault([first.outputs[0], second.outputs[1]]) == "a call's output is there in part"

    nothing = truth.made(0, rows)
    assert fault(dropped=[nothing]) is None
    assert fault(rows, dropped=[nothing]) == "rows are there twice"


def test_a_seed_gives_one_history() -> None:
    for seed in range(20):
        assert simulate(seed, HARSH) == simulate(seed, HARSH)


def test_there_are_pipelines_of_every_kind() -> None:
    pipelines = [random_pipeline(random.Random(seed)) for seed in range(EACH)]
    operators = [operator for pipeline in pipelines for operator in pipeline.operators]
    stages = [stage for operator in operators for stage in operator.stages]
    seen = {(stage.kind, stage.whole, stage.steady) for stage in stages}
    assert len(seen) == math.prod((len(Kind), 2, 2))
    assert any(len(pipeline.operators) == 1 for pipeline in pipelines)
    assert any(len(pipeline.operators) > 3 for pipeline in pipelines)
    assert any(pipeline.unsteady for pipeline in pipelines)
    assert any(operator.writes and operator.stages for operator in operators)
    assert any(pipeline.file_per_source for pipeline in pipelines)
