"""Everything that ray_resume knows of Ray Data's internals.

No other package imports `ray.data._internal`. A new release of Ray is looked at here first.

May import: `core`, `errors`.
Runs in: the driver, workers.
Start reading in: `plan` (what may be armed), then `rewrite` (how).
"""
