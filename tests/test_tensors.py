"""Weights and checkpoints: whole, or an error and what was there before."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import random_encoder

from xmag.errors import OutputError
from xmag.hub.weights import write_tensors


def on_a_full_disk(run: Callable[[], object]) -> str:
    """The message of the OutputError that `run` raises where files end after 50,000 bytes."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OutputError) as caught:
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return str(caught.value)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    write_tensors(tmp_path / "x.safetensors", tensors, metadata={"format": "pt"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_is_an_output_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.zeros(3)}, metadata={})
    before = path.read_bytes()
    large = {"a": torch.zeros(100_000)}
    message = on_a_full_disk(lambda: write_tensors(path, large, metadata={}))
    assert "x.safetensors cannot be written" in message
    assert "free some space" in message
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_an_encoder_that_finds_no_room_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    encoder = random_encoder()
    message = on_a_full_disk(lambda: encoder.save(tmp_path))
    assert "model.safetensors cannot be written" in message
    assert list(tmp_path.iterdir()) == []
