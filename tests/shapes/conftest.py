"""Let the tests import the scripts of tools/shapes as they import one another."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "shapes"))
