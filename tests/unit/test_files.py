"""Files of tensors."""

from __future__ import annotations

from pathlib import Path

import torch

from qkscope.files import read_tensors, write_tensors


def test_tensors_lie_in_memory_as_others_do(tmp_path: Path) -> None:
    """A product's last bits depend on where its factors begin, and a run that goes on must end with the same ones."""
    written = {f"tensor {n}": torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in range(1, 40, 2)}
    write_tensors(tmp_path / "a.safetensors", written)
    found, _ = read_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], value) for name, value in written.items())
    assert {tensor.data_ptr() % 64 for tensor in found.values()} == {0}
