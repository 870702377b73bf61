"""List the sources of a read, read them, seal them.

May import: `core`, `raydata`, `run.client`, `failpoints`, `errors`; `resumable_read` also
`checkpoint`.
Runs in: the driver (listing), workers (reading).
Start reading in: `resumable_read`, then `datasource` and `read_task`.
"""
