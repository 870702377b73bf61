"""One run, from its lease to its clean-up; the ledger's process, and the wire to it.

Uses Ray's actors, and never Ray Data.

May import: `core`, `checkpoint`, `failpoints`, `errors`.
Runs in: the driver, the ledger's process. `client` runs in workers, too.
Start reading in: `run`, then `ledger_actor`.
"""
