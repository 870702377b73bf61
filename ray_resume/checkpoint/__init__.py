"""The committed sources, the place that holds them, and the runs that are alive.

Owns the checkpoint as its user sees it (`checkpoint`), and the two kinds of place that hold one:
a directory of one host (`local`), and a storage that hosts share (`shared`).

Files of runs that the checkpoint does not know are an error, not leftovers: a writer's file was
removed or restored from an older copy, and going on would write its rows twice.

On a tie of sequence numbers, the lower run id *in the records* counts, not that of the files: a
merged file stands for several runs, and the snapshot must be the same beside any subset of them.

Etags are not kept. pyarrow's listings do not have them, one request for each object would cost
more than the listing, and a store changes the modification time whenever it changes an object.

May import: `core`, `failpoints`, `errors`. Never Ray.
Runs in: the driver, the ledger's process, the command line.
Start reading in: `contents`, then `local.backend`.
"""
