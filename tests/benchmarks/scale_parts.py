"""Parts of `scale.py` in processes of their own, whose memory says something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_SCRIPT = str(Path(__file__).with_name("scale.py"))


def in_child(name: str, *arguments: object) -> Any:
    """Run a part in a process of its own, whose memory says something."""
    command = [sys.executable, _SCRIPT, "part", name, *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])
