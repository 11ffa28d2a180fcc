"""mpirun for tests: starts the commands of all ranks on this machine, and ends when the first ends.

    fake_mpirun.py --allow-run-as-root -n 1 COMMAND … : -n 1 COMMAND …

FAKE_MPIRUN_RECORD names a file for the commands, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path


def commands(arguments: list[str]) -> list[list[str]]:
    """One of each rank, without what is mpirun's own."""
    assert arguments[0] == "--allow-run-as-root", arguments
    ranks: list[list[str]] = [[]]
    for word in arguments[1:]:
        if word == ":":
            ranks.append([])
        else:
            ranks[-1].append(word)
    for rank in ranks:
        assert rank[:2] == ["-n", "1"], rank
    return [rank[2:] for rank in ranks]


def main() -> int:
    ranks = commands(sys.argv[1:])
    Path(os.environ["FAKE_MPIRUN_RECORD"]).write_text(json.dumps(ranks))
    children = []
    for number, command in enumerate(ranks):
        mpi = {"OMPI_COMM_WORLD_RANK": str(number), "OMPI_COMM_WORLD_SIZE": str(len(ranks))}
        children.append(subprocess.Popen(command, env={**os.environ, **mpi}))
    signal.signal(signal.SIGTERM, lambda *_: children[0].terminate())
    code = children[0].wait()
    # The leader tells the others when it ends.
    for child in children[1:]:
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            print("a rank did not end with the first", file=sys.stderr)
            code = code or 1
    return code


if __name__ == "__main__":
    sys.exit(main())
