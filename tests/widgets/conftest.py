"""Lets the tests of views, here and in tests/browser, import `synthetic`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
