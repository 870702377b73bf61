"""One run, from its lease to its clean-up; the ledger's process, and the wire to it.

Uses Ray's actors, and never Ray Data.

The steps of a run, whose order keeps rows safe:

0. **Prepare.** With ``shard=``, the sources of the run are those whose digest says so
   (`core.shards`). If the checkpoint has more than 64 writers' files, and no run is at work, the
   driver merges them.
1. **Lease.** The driver takes the run's lease. A live run with a common source makes it wait, and
   then refuse.
2. **Skip.** The driver lists the output folder, *then* reads the checkpoint. In the other order,
   a neighbour that starts in between would look like a stranger. The newest record of each
   source, over all dead runs, says what is committed (`core.snapshot`, `core.resume_plan`). Where
   a dead run left a publication open, the driver first asks the table about it (`settling`).
3. **Ledger.** An actor on the driver's node (`ledger_actor`) joins the lease and creates the run's
   own file. Its process takes a second to start, and the first pass begins meanwhile. The ledger
   commits nothing before the driver has confirmed that the lease was held until then. In it,
   `ledger_host` applies messages to the ledger, and `committer` commits what they complete. Each
   has a lock, and the host's is taken first.
4. **Passes.** Each pass executes a private copy of the plan. Sources that get lost on the way (a
   worker dies between two blocks) are executed again: all of them, each in a read task of its own,
   then halves of what is lost again, then one source at a time (`core.passes`, `pass_loop`). A
   source that gets lost alone has failed. The ledger commits that at once, because the run may yet
   end with an error. Sources that get lost together do not count towards quarantine: one bad row
   would give up hundreds of good files that went through the same tasks. For a table, the driver
   publishes what is complete, every ``publish_interval_s`` and at the end of each pass
   (`publisher`); the ledger commits it after that.
5. **End.** The ledger closes. The driver notes which runs are dead, *then* reads the records,
   *then* removes leftovers; the lease ends. Then the output is tidied, under a lease of its own
   (`write.tidying`).

`write.execution` lets Ray retry a task whose worker died three times, not for ever as by default. A
row that kills its worker would stop the job for good.

Workers send dead letters to the ledger, which writes them, because a worker may be on a node that
does not see the checkpoint.

SLURM sends SIGTERM to Ray's own processes, too. Ray then ends a driver that misses its raylet
with exit code 1. Nothing is lost; the next run removes the leftovers.

May import: `core`, `checkpoint`, `failpoints`, `errors`.
Runs in: the driver, the ledger's process. `client` runs in workers, too.
Start reading in: `run`, then `ledger_host` and `committer`.
"""
