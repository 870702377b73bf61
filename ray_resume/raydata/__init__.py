"""Everything that ray_resume knows of Ray Data's internals.

No other package imports `ray.data._internal`. A new release of Ray is looked at here first.

- Plans: `plan` (what may be armed), `arming` (how), `expressions`, `signature`, `guards`.
- Reads: `filereads` and `scans` (Ray's two readers), `paths`.
- Blocks: `blocks`, `user_batches` (batches that user code may still change).
- Writes and actors: `datasinks`, `pool_actors`, `pool_watch` (actors that do not come back).
- Errors that the user wants retried: `retries`.
- Versions: `internals`.

May import: `core`, `errors`.
Runs in: the driver, workers.
Start reading in: `plan`, then `arming`.
"""
