#!/usr/bin/env python3
"""Build an engine: the command line of ``trt-razor build`` as a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trt_razor.cli import build_main

if __name__ == "__main__":
    sys.exit(build_main())
