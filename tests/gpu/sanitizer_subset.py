"""A few layers through every kind of call, in few launches: what compute-sanitizer runs.

compute-sanitizer --tool racecheck python tests/gpu/sanitizer_subset.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from gpu_device import WaitingKernels, buffers_on_gpu, missing
from harness import check
from razor_layers import Layer
from schedules import AXES, everything, layer_of, pairwise

# A layer of the test matrix for each head_dim, and the default one.
LAYERS = [Layer()]
for _layer in (layer_of(choice) for choice in pairwise(AXES)):
    if sum(_layer.head_dim == x.head_dim for x in LAYERS) < 2:
        LAYERS.append(_layer)


def main() -> int:
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    kernels = WaitingKernels()
    with buffers_on_gpu():
        for layer in LAYERS:
            check(kernels, layer, everything())
            print(layer, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
