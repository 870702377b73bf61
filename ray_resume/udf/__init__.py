"""The decorator, and what runs in the place of a decorated UDF.

The decorator only marks a UDF, so nothing can behave differently outside of an armed pipeline.
Arming makes new operators with callables of the same name, which hold the ledger's handle. No run
state is in the dataset's context.

A worker holds a generator's output back as a block, not as a shallow copy. The generator's next
step may refill the arrays and lists that it has yielded, and plain Ray Data converts them at once.

May import: `core`, `raydata`, `run.client`, `failpoints`, `errors`.
Runs in: workers; `decorator`, and `instrument` in `stage`, also in the driver.
Start reading in: `stage`, then `accounting`.
"""
