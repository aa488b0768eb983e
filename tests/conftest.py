"""What every test stands on: no network, one thread a process, and the folder of small models beside the repository."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported: its kernels then run on a CPU

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)  # workers share the cores, and models this small are three times slower with two threads


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared with small models and texts; a test that needs it is skipped where it is not there."""
    folder = ROOT.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"no {folder}/models: the small models lie beside the repository")
    return folder
