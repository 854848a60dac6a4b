"""The device is chosen as asked, its peak is plausible, and files appear whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from genscale.runtime.device import device_summary, memory_free, memory_used, pick_device
from genscale.runtime.errors import UserError
from genscale.runtime.files import checksum, write_atomically
from genscale.runtime.peak import matmul_peak


def test_a_device_that_is_not_here_is_named() -> None:
    with pytest.raises(UserError, match=r"layout\.device: 'cuba' is no device"):
        pick_device("cuba")
    if not torch.accelerator.is_available():
        with pytest.raises(UserError, match="'cuda' is not on this machine"):
            pick_device("cuda")
        assert pick_device("auto").type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine")
def test_auto_is_the_accelerator_and_its_memory_is_known() -> None:
    device = pick_device("auto")
    assert device.type == torch.accelerator.current_accelerator().type
    assert memory_free(device) > 0


def test_the_measured_peak_is_not_below_what_a_product_reaches() -> None:
    device = torch.device("cpu")
    peak = matmul_peak(device, torch.float32)
    assert peak.kind == "measured"
    assert 1e9 < peak.flops < 1e14
    assert matmul_peak(device, torch.float32) == peak, "measured once for each process"


def test_summary_and_memory() -> None:
    device = torch.device("cpu")
    summary = device_summary(device)
    assert summary["kind"] == "cpu"
    assert summary["threads"] == torch.get_num_threads()
    before = memory_used(device)
    block = torch.ones(30_000_000)
    assert memory_used(device) - before > 0.5 * block.nbytes or before > block.nbytes * 2


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts.json"
    write_atomically(path, "old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["facts.json"]


def test_checksum_is_blake2b(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"genscale" * 1000)
    assert checksum(path) == hashlib.blake2b(b"genscale" * 1000, digest_size=16).hexdigest()
