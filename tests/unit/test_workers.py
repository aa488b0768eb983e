"""Workers end with the process that made them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

BENCHMARK = """
import os, sys, time
from qkscope.evaluate.workers import worker_pool

def task(_):
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    with worker_pool(1) as pool:
        list(pool.map(task, [0]))
"""


def test_a_killed_benchmark_leaves_no_worker(tmp_path: Path) -> None:
    script = tmp_path / "benchmark.py"
    script.write_text(BENCHMARK)
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert alive(worker)
        parent.send_signal(signal.SIGKILL)
    end = time.monotonic() + 30
    while alive(worker) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(worker)


def alive(process: int) -> bool:
    """Whether it runs; one that ended and that nobody has asked after is still listed, as a zombie."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
