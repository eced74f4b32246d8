import pytest
import torch
from torch import nn

from training import checkpoint
from utils import disk


def trained(steps: int, module=None, optimizer=None):
    torch.manual_seed(0)
    module = module or nn.Linear(3, 2)
    optimizer = optimizer or torch.optim.AdamW(module.parameters(), lr=0.1)
    for i in range(steps):
        module(torch.full((1, 3), float(i + 1))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def test_training_from_a_loaded_checkpoint_is_bit_identical(tmp_path):
    module, optimizer = trained(3)
    checkpoint.save(tmp_path / "s.safetensors", {"m": module}, optimizer, {"update": 3, "note": "ä"})
    other = nn.Linear(3, 2)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    assert checkpoint.load(tmp_path / "s.safetensors", {"m": other}, other_optimizer) == {"update": 3, "note": "ä"}
    trained(2, module, optimizer)
    trained(2, other, other_optimizer)
    assert torch.equal(module.weight, other.weight) and torch.equal(module.bias, other.bias)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "s.safetensors"
    disk.write(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(Exception):  # noqa: B017 - whatever safetensors raises for a tensor it cannot write
        disk.write(path, {"a": torch.ones(2).to_sparse()})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
