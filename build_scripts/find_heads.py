#!/usr/bin/env python3
"""Find retrieval heads: the command line of ``trt-razor heads`` as a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trt_razor.cli import heads_main

if __name__ == "__main__":
    sys.exit(heads_main())
