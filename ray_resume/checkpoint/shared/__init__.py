"""A checkpoint in a storage that hosts share: whole objects, heartbeats, and a mutex from these.

Runs in: the driver, the ledger's process, the command line.
Start reading in: `backend`.
"""
