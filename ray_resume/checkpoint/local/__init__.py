"""A checkpoint in a directory of one host: LMDB files, and locks of the kernel.

Runs in: the driver, the ledger's process, the command line.
Start reading in: `backend`.
"""
