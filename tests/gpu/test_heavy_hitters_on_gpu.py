"""tests/plugins/test_heavy_hitters.py with the fixtures of this folder: the same tests on a GPU."""

from gpu_device import skip_without_gpu

skip_without_gpu()

from test_heavy_hitters import *  # noqa: E402, F403
