"""The committed sources, the place that holds them, and the runs that are alive.

Owns the checkpoint as its user sees it (`checkpoint`), and the base class (`backend`) of both
kinds: a directory of one host (`local`), and a storage that hosts share (`shared`).

Output files of runs that the checkpoint does not know are an error, not leftovers. A user removed a
writer's file, or restored an older copy, and the next run would write its rows twice.

On a tie of sequence numbers, the lower run id *in the records* counts, not that of the files. A
merged file replaces those of several runs, and beside any of them the result must be the same.

Etags are not kept. pyarrow's listings lack them, and one request per object would cost more than
the listing. A store changes the modification time whenever it changes an object.

May import: `core`, `failpoints`, `files`, `filesystems`, `errors`; `checkpoint` also
`write.folder` and `write.tidying`, `rebinding` also `write.folder`. Never Ray.
Runs in: the driver, the ledger's process, the command line.
Start reading in: `backend`, then `contents` and `local.backend`.
"""
