"""Write rows and drain them; `resumable_write` puts a pipeline together.

May import: `core`, `raydata`, `run.client`, `run.output`, `failpoints`, `errors`; `output` also
`checkpoint`; `resumable_write` also `read`, `udf` and `run`.
Runs in: the driver (`resumable_write`, `output`), workers (the sinks).
Start reading in: `resumable_write`, then `file_sink`.
"""
