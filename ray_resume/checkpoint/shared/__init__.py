"""A checkpoint in a storage that hosts share: whole objects, heartbeats, and a mutex from these.

Object stores have no locks, and pyarrow offers no conditional writes. All that this package asks
of a storage is that an object appears whole, and that a later listing shows it. From that:

* **Turns** (`mutex`): Lamport's bakery keeps apart the processes that take leases or draw ranks.
  A process stays inside for at most half of the time after which others pass it over.
* **Heartbeats** (`heartbeat`): the driver and the ledger replace an object each, six times in
  ``lease_ttl_s``. A process that sees one unchanged for that long, on its own clock, may declare
  the run dead. The run trusts its lease for three quarters of that time since before its last
  heartbeat. So clocks are never compared, and a stopped process knows, when it wakes up, that it
  is too late.
* **Publish, then confirm** (`writer`): a commit is an object with the next number. The run calls
  it committed only if it was surely alive *after* the object was there. A process that declares
  the run dead lists its objects afterwards, and sees the commit.
* **Fences** (`segments`): a process that finds a run dead first records up to which number the
  run's objects count. It relies on nothing before. The lowest of several such fences holds.
  Objects that a stopped process lands later count for no run. Then the process removes the dead
  run's lease. A run that ends by itself fences itself before it cleans up, because its ledger may
  have an object on its way.
* **The kernel's lock** (`scratch`): a lock in the host's directory for temporary files proves a
  death at once to a successor on the same host. Elsewhere it proves nothing.
* **Few objects**: every 64 parts, a run publishes all of its records as one object and removes
  the parts. An ended run is one object and a fence. The start of a run merges more than 64 runs,
  as on a local disk.

The storage holds no LMDB file: LMDB's pages are of no use to hosts that cannot map them. A run
publishes records with a checksum, and others read them as a whole.

Two successors may both find a run dead while its last object lands between their listings. They
then write different fences. The lowest holds, so a source may be done again; its output is there
once.

Known limits, none of which loses a row:

* A run that cannot reach its storage for some 18 s (at a TTL of 30 s) ends with an error. A
  commit fails after 12 s of failing requests.
* Clients of NFS may cache listings for a minute, so ``lease_ttl_s`` is 120 s there. No test covers
  that, nor GCS, Azure and HDFS. They need to offer nothing that S3 does not.
* A process killed while acquiring a lease leaves its claim file behind (16 bytes per source).
  Nothing removes it.
* Two first runs may have two outputs and one new checkpoint. If one of them is stopped while it
  binds the checkpoint, it may bind it late. The next start is refused, and says to which output
  the checkpoint is bound.
* An array task that is killed while it draws its rank may leave a rank that two tasks have. Their
  leases exclude each other, and the next run does the rest.

Costs: two small writes for each sixth of a TTL; one listing, one read and one write for each
commit; one listing of the leases for each TTL.

`test_shared_histories` runs this code with every step in any order: with deaths, stops, failing
requests, late writes, compactions, resets, and listings that are no snapshots.

Runs in: the driver, the ledger's process, the command line.
Start reading in: `backend`.
"""
