"""Makes the modules of perf/ importable by their names, as they are for `python perf/run.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "perf"))
