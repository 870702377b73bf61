"""The decorator, and what runs in the place of a decorated UDF.

May import: `core`, `raydata`, `run.client`, `failpoints`, `errors`.
Runs in: workers.
Start reading in: `stage`, then `accounting`.
"""
