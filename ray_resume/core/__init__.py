"""Every rule that rows depend on, without any input or output.

Owns tokens, the ledger, sources, records, and the decisions of a run: which sources to read,
which passes to execute, which files count. Nothing here does I/O, reads a clock, starts a thread,
or knows Ray or LMDB, so a test reaches each rule without a cluster.

May import: `errors`.
Runs in: any process.
Start reading in: `ledger`, then `tokens`.
"""
