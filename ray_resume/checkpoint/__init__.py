"""What is committed, where it is kept, and which runs are alive.

Owns the checkpoint as its user sees it (`checkpoint`), and the two kinds of place that hold one: a
directory of one host (`local`), and a storage that hosts share (`shared`).

May import: `core`, `failpoints`, `errors`. Never Ray.
Runs in: the driver, the ledger's process, the command line.
Start reading in: `contents`, then `local.backend`.
"""
