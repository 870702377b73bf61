"""A checkpoint in a storage that hosts share: whole objects, heartbeats, and a mutex from these.

Object stores have no locks, and pyarrow offers no conditional writes. All that this package asks
of a storage is that an object appears whole, and that a later listing shows it. From that:

* **Turns** (`mutex`): Lamport's bakery keeps apart the processes that take leases or draw ranks.
  A process stays inside for at most half of the time after which others pass it over.
* **Signs of life** (`heartbeat`): the driver and the ledger replace an object each, six times in
  ``lease_ttl_s``. A process that sees one unchanged for that long, on its own clock, may declare
  the run dead. The run trusts its lease for three quarters of that time since before its last
  heartbeat. So clocks are never compared, and a stopped process knows, when it wakes up, that it
  is too late.
* **Publish, then confirm** (`backend`): a commit is an object with the next number. The run calls
  it committed only if it was surely alive *after* the object was there. A process that declares
  the run dead lists it afterwards, and sees it.
* **Fences** (`segments`): a process that finds a run dead writes down, before it relies on
  anything, up to which number the run's objects count. The lowest of several such notes holds.
  Objects that a stopped process lands later count for no run. Only then the dead run's lease is
  removed. A run that ends by itself does the same to itself before it cleans up, because its
  ledger may have an object on its way.
* **The kernel's word**: a lock in the host's directory for temporary files proves a death at once
  to a successor on the same host. Elsewhere it proves nothing.
* **Few objects**: every 64 parts, a run publishes all of its records as one object and removes
  the parts. An ended run is one object and a fence. More than 64 runs are merged at a start, as
  on a local disk.

There is no LMDB file here: LMDB's pages are of no use to hosts that cannot map them. Records are
published with a checksum, and read in one go.

Two successors that both find a run dead, while its last object lands between their looks, may
write different fences. The lowest holds, so a source may be done again; its output is there once.

Known limits, none of which loses a row:

* A run without its storage for some 18 s (at a TTL of 30 s) ends, and says so. Publishing gives
  up after 12 s of failures.
* Clients of NFS may cache listings for a minute, so ``lease_ttl_s`` is 120 s there. This was
  reasoned about, not tested. GCS, Azure and HDFS were not tested either; pyarrow is asked nothing
  of them that it is not asked of S3.
* A process killed while acquiring a lease leaves its claim file behind (16 bytes per source).
  Nothing removes it.
* Two first runs may have two outputs and one new checkpoint. If one of them is stopped while it
  binds the checkpoint, it may bind it late. The next start is refused, and says to which output
  the checkpoint is bound.
* An array task that is killed between drawing its rank and noting that in time leaves a rank that
  two tasks have. Their leases exclude each other, and the next run does the rest.

Costs: two small writes for each sixth of a TTL; one listing, one read and one write for each
commit; one listing of the leases for each TTL.

`test_shared_histories` runs this very code, every step in any order, with deaths and stops,
failing requests, late writes, compactions, resets, and listings that are no snapshots.

Runs in: the driver, the ledger's process, the command line.
Start reading in: `backend`.
"""
