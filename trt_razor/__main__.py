"""``python -m trt_razor``: the command line of ``trt-razor``."""

import sys

from trt_razor.cli import main

if __name__ == "__main__":
    sys.exit(main())
