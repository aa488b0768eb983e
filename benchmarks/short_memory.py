"""Whether a run ends well where memory is short, and what it counts beforehand.

    python benchmarks/short_memory.py --free 5.5 3.7 -- --layers all --dictionary.width 60000 --training.tokens 4096

What follows `--` goes to `qkscope run`. For each number of GB this process holds so much memory that about that much is
left, and starts the run. Printed: how it ended, and what it said of its memory. A run that takes more than is left is
killed by the system (status -9): nothing else should be at work.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile

import torch

from qkscope.memory import free_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--free", type=float, nargs="+", required=True, help="GB")
    parser.add_argument("options", nargs="*", help="of qkscope run, after --")
    args = parser.parse_args()
    print(" ".join(args.options))
    for free in args.free:
        held = bytearray(max(free_memory(torch.device("cpu")) - int(free * 1e9), 0))
        held[:: os.sysconf("SC_PAGE_SIZE")] = b"\1" * len(range(0, len(held), os.sysconf("SC_PAGE_SIZE")))
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "qkscope", "run", *args.options, "--out", f"{folder}/run"]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        del held
        lines = done.stderr.splitlines()
        said = [line for line in lines if line.startswith("training takes")] or lines[-1:]
        print(f"{free:.1f} GB left: status {done.returncode}; {said[0]}", flush=True)


if __name__ == "__main__":
    main()
