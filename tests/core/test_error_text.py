"""The text of an error, as records keep it and a list of runs shows it."""

from __future__ import annotations

from ray_resume.checkpoint.status import last_line
from ray_resume.core.error_text import message_of


def test_the_advice_of_ray_data_is_no_error() -> None:
    error = OSError(
        "Could not open 'raw/1.parquet': it has 7 bytes\n"
        "Failed to read fragment raw/1.parquet after 1/10 attempts (total backoff 0.0s).\n"
        "To change retry attempts, configure `ray.data.DataContext.get_current()` if you believe "
        "this to be transient."
    )
    shown = last_line(message_of(error))
    assert shown == "OSError: Could not open 'raw/1.parquet': it has 7 bytes"
