"""``python -m ray_resume`` is ``ray-resume``."""

import sys

from ray_resume.cli import main

sys.exit(main())
