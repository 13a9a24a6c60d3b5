"""Lets the tests of streaming import `reference` and `streams`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
