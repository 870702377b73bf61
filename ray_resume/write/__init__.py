"""Write rows and drain them; `resumable_write` puts a pipeline together.

A flush of a write task is one file with rows of many sources (`file_sink`, `layout`). At the end of
a run the driver tidies the output: it rewrites files with dead rows and merges small ones
(`tidying`, `row_copies`), and gives files with old types the new ones (`retyping`). `rewriter` has
the order of these steps.

May import: `core`, `raydata`, `run.client`, `run.output`, `failpoints`, `errors`; `output`,
`rewriter`, `tidying` and `retyping` also `checkpoint`; `resumable_write`, `targets` and `execution`
also `read`, `udf` and `run`.
Runs in: the driver (`resumable_write`, `targets`, `execution`, `output`, `tidying`),
workers (the sinks, `rewrite_tasks`, `row_copies`), the command line (`tidying`).
Start reading in: `resumable_write`, `targets` and `execution`, then `file_sink`.
"""
