"""A checkpoint in a directory of one host: LMDB files, and locks of the kernel.

The driver and the ledger's process hold a run's lease as one shared flock each, so the run is
alive while either lives. A killed driver's ledger keeps its successor out until the kernel has
ended it. Even a ledger that SIGSTOP holds in the middle of a commit cannot be overtaken.

A child process reads LMDB files (60 ms). LMDB trusts its pages: a page of zeros, which a power
cut leaves, ends the process that reads it by SIGABRT. In a child, that becomes an error which
names the file.

Keys ascend. With digests as keys, each durable commit would write most pages of a large file.

Runs in: the driver, the ledger's process, the command line.
Start reading in: `backend`.
"""
