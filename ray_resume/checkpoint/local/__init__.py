"""A checkpoint in a directory of one host: LMDB files, and locks of the kernel.

The driver and the ledger's process hold a run's lease as one shared flock each, so the run is
alive while either process lives. A killed driver's ledger keeps the successor out until the kernel
has ended it. No successor overtakes a ledger that SIGSTOP holds in the middle of a commit.

A child process reads LMDB files (60 ms). LMDB trusts its pages: a power cut may leave a page of
zeros, and SIGABRT then ends the process that reads it. In a child, that becomes an error which
names the file.

Keys ascend. With digests as keys, each durable commit would write most pages of a large file.

Runs in: the driver, the ledger's process, the command line.
Start reading in: `backend`.
"""
