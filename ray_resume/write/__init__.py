"""Write rows and drain them; `resumable_write` puts a pipeline together.

May import: `core`, `raydata`, `run.client`, `run.output`, `failpoints`, `errors`; `output` also
`checkpoint`; `resumable_write`, `targets` and `execution` also `read`, `udf` and `run`.
Runs in: the driver (`resumable_write`, `targets`, `execution`, `output`), workers (the sinks).
Start reading in: `resumable_write`, `targets` and `execution`, then `file_sink`.
"""
