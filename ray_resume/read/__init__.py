"""List the sources of a read, read them, seal them.

How a read goes:

1. **List.** `resumable_read` finds the files, row groups, keys or read tasks, and gives each a
   stable id. An `Input` (`inputs`, `key_input`, `datasource_input`) knows all of them, and how read
   tasks for them are made.
2. **Plan.** The driver plans Ray's own reader over the first files that were listed, in every run
   the same, whatever is pending. So the schema of a read does not depend on where a crash was.
3. **Execute.** `ResumableDatasource` reads as plain Ray Data would. An armed pipeline has an
   `ArmedDatasource` in its place, for the pending sources of one pass.
4. **Read.** On a worker, a `ResumableReadTask` opens its sources one after another, gives each row
   its token, and seals each source after its last row. A source that cannot be read fails alone.

Another pipeline's checkpoint as input (`upstream`): its sources keep their ids, and are found by
the parts of its output files. `file_rows` reads these with Ray's own reader, once for neighbors.

Relative paths stay relative where a column shows them, as in plain Ray Data; ids are absolute
(`paths`, `workdir`).

May import: `core`, `raydata`, `run.client`, `files`, `filesystems`, `failpoints`, `errors`;
`resumable_read` also `checkpoint`.
Runs in: the driver (listing), workers (reading).
Start reading in: `resumable_read`, then `datasource` and `read_task`.
"""
