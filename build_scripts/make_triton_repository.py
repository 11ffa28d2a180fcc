#!/usr/bin/env python3
"""Write a Triton model repository: the command line of ``trt-razor triton`` as a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trt_razor.cli_serving import triton_main

if __name__ == "__main__":
    sys.exit(triton_main())
