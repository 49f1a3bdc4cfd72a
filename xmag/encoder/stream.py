"""Pipeline of tiles through one GPU: copies, embedding and fetches overlap."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from xmag.encoder.model import Encoder

Tag = TypeVar("Tag")

_BATCHES_IN_FLIGHT = 3
"""Most batches on the device: it never waits for the host to fetch or prepare one."""


@dataclass(slots=True)
class _Chunk(Generic[Tag]):
    """Tiles that came together, and their embeddings as far as they have landed."""

    tag: Tag
    features: NDArray[np.float32]
    missing: int


@dataclass(slots=True)
class _Batch(Generic[Tag]):
    """A batch that is filled on the device: its tiles, and the rows of chunks that they are."""

    tiles: Tensor
    filled: int = 0
    parts: list[tuple[_Chunk[Tag], int, int]] = field(default_factory=list)


class _Flying(NamedTuple, Generic[Tag]):
    """A batch under way: its rows, embeddings in pinned memory, and the event of their arrival."""

    parts: list[tuple[_Chunk[Tag], int, int]]
    features: Tensor
    done: torch.cuda.Event


class TileStream(Generic[Tag]):
    """Stream that embeds chunks of tiles in full batches on a GPU and returns them in order.

    Chunks of any size and from any number of slides are packed into batches of `batch_size`.
    Copies to the device have a CUDA stream of their own, so that they overlap with computing.
    Nothing here waits for the whole device; a result is waited for only when enough later batches
    are under way.
    """

    def __init__(self, encoder: "Encoder", *, batch_size: int) -> None:
        self._encoder, self._batch_size = encoder, batch_size
        self._limit = batch_size
        device = encoder.device
        self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._computing = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._computing.wait_stream(torch.cuda.current_stream(device))
        self._filling: _Batch[Tag] | None = None
        self._flying: deque[_Flying[Tag]] = deque()
        self._copied: deque[tuple[torch.cuda.Event, Callable[[], None]]] = deque()
        self._chunks: deque[_Chunk[Tag]] = deque()

    def put(self, tag: Tag, tiles: Tensor, *, on_copied: Callable[[], None] | None = None) -> None:
        """Take in uint8 tiles (B, S, S, 3); their embeddings come out of `landed` with `tag`.

        With `on_copied`, `tiles` are pinned memory, which must stay as it is until that is called.
        Without, they are copied now.
        """
        chunk = _Chunk(tag, np.empty((len(tiles), self._encoder.embed_dim), np.float32), len(tiles))
        self._chunks.append(chunk)
        taken = 0
        with torch.cuda.device(self._encoder.device):
            while taken < len(tiles):
                taken += self._fill(chunk, tiles, taken)
            copied = _recorded(self._copying)
            if on_copied is not None:
                self._copied.append((copied, on_copied))
            else:  # whoever gave them may write to them again, and the copy may not be over
                copied.synchronize()
        self.poll()

    def poll(self) -> None:
        """Call `on_copied` for the chunks whose tiles have reached the device."""
        while self._copied and self._copied[0][0].query():  # type: ignore[no-untyped-call]
            self._copied.popleft()[1]()

    def landed(self) -> Iterator[tuple[Tag, NDArray[np.float32]]]:
        """The tags and embeddings, float32 (B, D), of chunks that are complete, in order."""
        self.poll()
        while self._flying and (
            len(self._flying) > _BATCHES_IN_FLIGHT or self._flying[0].done.query()  # type: ignore[no-untyped-call]
        ):
            self._land(self._flying.popleft())
        while self._chunks and not self._chunks[0].missing:
            chunk = self._chunks.popleft()
            yield chunk.tag, chunk.features

    def finish(self) -> Iterator[tuple[Tag, NDArray[np.float32]]]:
        """Remaining tags and embeddings, once everything put in has been embedded."""
        if self._filling is not None:
            self._submit(self._filling)
        while self._flying:
            self._land(self._flying.popleft())
        yield from self.landed()

    def _fill(self, chunk: _Chunk[Tag], tiles: Tensor, taken: int) -> int:
        """Copy tiles of a chunk, from `taken` on, as far as they fit; returns their number."""
        if self._filling is None:
            with torch.cuda.stream(self._copying):
                shape = (self._batch_size, *tiles.shape[1:])
                device = self._encoder.device
                self._filling = _Batch(torch.empty(shape, dtype=torch.uint8, device=device))
        batch = self._filling
        count = min(len(tiles) - taken, self._batch_size - batch.filled)
        with torch.cuda.stream(self._copying):
            target = batch.tiles[batch.filled : batch.filled + count]
            target.copy_(tiles[taken : taken + count], non_blocking=True)
        batch.parts.append((chunk, taken, count))
        batch.filled += count
        if batch.filled == self._batch_size:
            self._submit(batch)
        return count

    def _submit(self, batch: _Batch[Tag]) -> None:
        """Embed a batch as soon as its tiles are there."""
        self._filling = None
        self._computing.wait_stream(self._copying)
        with torch.cuda.device(self._encoder.device), torch.cuda.stream(self._computing):
            # The memory goes back to the copying stream only when this stream is through with it.
            batch.tiles.record_stream(self._computing)
            embedded, self._limit = self._encoder.embed_in_parts(
                batch.tiles[: batch.filled], self._limit
            )
            kind: Any = {"dtype": torch.float32, "device": "cpu", "pin_memory": True}
            features = torch.empty(embedded.shape, **kind)
            features.copy_(embedded, non_blocking=True)
            self._flying.append(_Flying(batch.parts, features, _recorded(self._computing)))

    def _land(self, batch: _Flying[Tag]) -> None:
        """Hand the rows of a batch to their chunks."""
        batch.done.synchronize()
        rows, at = batch.features.numpy(), 0
        for chunk, first, count in batch.parts:
            chunk.features[first : first + count] = rows[at : at + count]
            chunk.missing -= count
            at += count


@contextmanager
def pinned(memory: NDArray[np.uint8]) -> Iterator[bool]:
    """Context that pins memory, and yields whether it could be pinned.

    Pinned memory, which the GPU copies from by itself, is scarce in some containers.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = memory.ctypes.data
    done = int(runtime.cudaHostRegister(address, memory.nbytes, 0)) == 0
    try:
        yield done
    finally:
        if done:
            torch.cuda.synchronize()
            runtime.cudaHostUnregister(address)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    # Waiting for it sleeps: a core that spins is a core that does not decode.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
