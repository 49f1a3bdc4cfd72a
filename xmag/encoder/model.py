"""Encoder, and TileEncoder, the protocol for encoders of the user's own."""

import copy
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xmag.devices import advise_dtype, full_precision, resolve_device, resolve_dtype
from xmag.encoder.stream import TileStream
from xmag.errors import InputError, ModelError
from xmag.files import write_text
from xmag.geometry import TileSpec
from xmag.hub.registry import FORMAT, ModelConfig
from xmag.hub.weights import write_tensors
from xmag.notebook import Rows, Shown
from xmag.urls import base_name
from xmag.vit import ViT

_logger = logging.getLogger(__name__)

Tiles = NDArray[np.uint8] | Tensor


@runtime_checkable
class TileEncoder(Protocol):
    """Protocol of an encoder: these four members, of xmag's Encoder or the user's own."""

    @property
    def tile_spec(self) -> TileSpec:
        """The tiles it takes: side in px, and µm/px."""

    @property
    def embed_dim(self) -> int:
        """The length D of an embedding."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Identity of the model, as plain JSON values."""

    def embed(self, tiles: NDArray[np.uint8], /) -> Tensor:
        """The embeddings of uint8 tiles (B, S, S, 3), float32 (B, D)."""


class Normalised(nn.Module):
    """Base of a forward pass: normalises uint8 tiles, in float32 whatever the model's dtype."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ) -> None:
        super().__init__()
        # A rounded mean would shift every tile.
        values = torch.tensor((mean, std), dtype=torch.float32, device=device)
        centre, spread = values.view(2, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * spread))
        self.register_buffer("shift", -centre / spread)

    def images(self, tiles: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalised images (B, 3, S, S) of tiles (B, S, S, 3)."""
        return (tiles.permute(0, 3, 1, 2) * self.scale + self.shift).to(dtype)


class _TileForward(Normalised):
    """uint8 tiles (B, S, S, 3) -> embeddings (B, D), or tokens (B, T, W) after the final norm."""

    positions: Tensor

    def __init__(
        self, vit: ViT, config: ModelConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(config.mean, config.std, device)
        side = config.tile_spec.size_px // config.vit.patch_px
        positions = vit.positions((side, side)).detach()  # from the weights before any rounding
        self.vit = vit.to(device, dtype)
        self.register_buffer("positions", positions.to(device, dtype))

    def forward(self, tiles: Tensor, pooled: bool = True) -> Tensor:
        images = self.images(tiles, self.positions.dtype)
        if pooled:
            return self.vit.embed(images, self.positions)
        return self.vit(images, self.positions)  # type: ignore[no-any-return]


class Encoder(Shown):
    """A loaded model: uint8 tiles in, embeddings out. Immutable, and usable from many threads.

    Takes `vit` over: moves it, puts it into eval mode and freezes it. Made by `load_model`.
    """

    def __init__(
        self,
        vit: ViT,
        config: ModelConfig,
        *,
        provenance: Mapping[str, Any],
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
    ) -> None:
        self._device = resolve_device(device)
        self._dtype = resolve_dtype(dtype, self._device)
        self._config = config
        self._take(_TileForward(vit, config, self._device, self._dtype), provenance)

    def _take(self, forward: nn.Module, provenance: Mapping[str, Any]) -> None:
        self._provenance = MappingProxyType(dict(provenance))
        self._forward = forward.eval().requires_grad_(False)
        self._run: Callable[[Tensor, bool], Tensor] = self._forward
        self._whole_batch: int | None = None

    @property
    def tile_spec(self) -> TileSpec:
        """The tiles that the model takes; the specification travels with the weights."""
        return self._config.tile_spec

    @property
    def embed_dim(self) -> int:
        """The length D of an embedding."""
        return self._config.vit.embed_dim

    @property
    def pooling(self) -> str:
        """Pooling of tokens to an embedding: "token", "token+mean" or "mean"."""
        return self._config.vit.pooling

    @property
    def config(self) -> ModelConfig:
        """The ViT's configuration, the tile specification and the normalisation."""
        return self._config

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Identity of the model, as plain JSON values.

        name, revision (the resolved commit), weights_sha256, key_layout, config, config_source
        ("given", "read", "registry" or "assumed"), terms, trained; and lineage, what it was made
        from and how, for a model that was fine-tuned.
        """
        return self._provenance

    @property
    def device(self) -> torch.device:
        """Device of the model's weights and arithmetic."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model's arithmetic; embeddings are float32 whatever it is."""
        return self._dtype

    @property
    def vit(self) -> ViT:
        """The frozen ViT, to be copied (copy.deepcopy) by whoever trains it."""
        return self._forward.vit  # type: ignore[return-value] # of the _TileForward

    def __repr__(self) -> str:
        name, spec = base_name(self._provenance.get("name")), self.tile_spec
        tiles = f"tiles of {spec.size_px} px at {spec.mpp:g} µm/px"
        dtype = str(self._dtype).removeprefix("torch.")
        return f"<Encoder {name!r}: {tiles}, {self.embed_dim} features; {self._device}, {dtype}>"

    def _rows(self) -> Rows:
        about = self._provenance
        facts = {name: about.get(name) for name in ("terms", "revision", "weights_sha256")}
        known = [[name, str(value)] for name, value in facts.items() if value]
        return [["provenance", ""], *known] if known else []

    def embed(self, tiles: Tiles) -> Tensor:
        """The embeddings of tiles: float32 (B, D) on the encoder's device.

        An embedding is the class token after the final norm, or what else the configuration's
        `pooling` says. `tiles` is uint8 (B, S, S, 3) RGB, an array or a tensor on any device; B may
        be 0. Raises InputError for anything else.
        """
        advise_dtype(self._device.type, self._dtype)
        checked = self._checked(tiles)
        embedded, _ = self.embed_in_parts(checked, max(len(checked), 1))
        return embedded.clone()  # autograd refuses tensors made in inference mode

    def embed_tokens(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """The class tokens (B, W) and the patch tokens (B, N, W), row by row, float32.

        Both after the final norm, on the encoder's device; registers are left out. W is the width
        of the ViT. Takes and raises what `embed` does.
        """
        checked = self._checked(tiles)
        tokens, _ = self.embed_in_parts(checked, max(len(checked), 1), pooled=False)
        return tokens[:, 0].clone(), tokens[:, 1 + self._config.vit.registers :].clone()

    def embed_stream(
        self, batches: Iterable[tuple[NDArray[np.int64], Tiles]]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Yields (coords, embeddings float32 (B, D)) for each (coords, tiles), in the same order.

        On CUDA the next batches are copied and submitted while earlier ones compute; results come a
        few batches late. A batch that does not fit into GPU memory is halved until it does, and so
        are those after it; ModelError where a single tile does not fit.
        """
        if self._device.type != "cuda":
            for coords, tiles in batches:
                yield coords, self.embed(tiles).cpu().numpy()
            return
        stream: TileStream[NDArray[np.int64]] | None = None
        for coords, tiles in batches:
            checked = self._checked(tiles)
            # The first batch is as large as any but the last.
            stream = stream or TileStream(self, batch_size=max(len(checked), 1))
            stream.put(coords, checked)
            yield from stream.landed()
        if stream is not None:
            yield from stream.finish()

    def compiled(self, *, batch_size: int = 256) -> "Encoder":
        """The same encoder with its forward pass compiled by torch.compile for this batch size.

        Compiling takes some 15 s at the first batch, and makes each later one faster by about a
        seventh on an H100: it pays from some ten thousand tiles a second for minutes on. Batches of
        other sizes are cut and padded to `batch_size`. Both encoders share their weights.
        """
        other = copy.copy(self)
        other._whole_batch = batch_size
        other._run = torch.compile(self._forward, dynamic=False)
        return other

    def named(self, name: str) -> "Encoder":
        """The same encoder with another name in its provenance; both share their weights."""
        other = copy.copy(self)
        other._provenance = MappingProxyType({**self._provenance, "name": name})
        return other

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write model.safetensors and config.json, which `load_model(directory)` reads.

        The weights are written in the encoder's dtype: load with dtype="float32" to keep them
        exact. Raises OutputError where the folder cannot be written.
        """
        folder = Path(directory)
        state = {key: t.detach().cpu().contiguous() for key, t in self.vit.state_dict().items()}
        about = {key: self._provenance.get(key) for key in ("name", "terms", "trained", "lineage")}
        config = FORMAT.dumps({**about, **self._config.to_dict()}, indent=2)
        write_tensors(folder / "model.safetensors", state, metadata={"format": "pt"})
        write_text(folder / "config.json", config + "\n")

    def _checked(self, tiles: Tiles) -> Tensor:
        size = self.tile_spec.size_px
        wanted = f"expected uint8 RGB tiles of shape (B, {size}, {size}, 3)"
        if not isinstance(tiles, np.ndarray | Tensor):
            raise InputError(f"tiles are a {type(tiles).__name__}; {wanted} in an array or tensor")
        shape = tuple(tiles.shape)
        if len(shape) != 4 or shape[1:] != (size, size, 3):
            raise InputError(f"tiles have shape {shape}; {wanted}. A single tile is tile[None]")
        if tiles.dtype not in (np.uint8, torch.uint8):
            raise InputError(
                f"tiles have dtype {tiles.dtype}; {wanted}, not yet normalised: the encoder does it"
            )
        if isinstance(tiles, Tensor):
            return tiles
        # torch takes neither negative strides nor, without a warning, read-only memory.
        return torch.from_numpy(np.require(tiles, requirements=["C", "W"]))

    def embed_in_parts(
        self, tiles: Tensor, limit: int, *, pooled: bool = True
    ) -> tuple[Tensor, int]:
        """The embeddings of tiles, made in parts of `limit`, and the limit that memory allowed.

        For streams: takes tiles that are checked, and returns what belongs to torch's inference
        mode, float32 (B, D), or all tokens (B, T, W) where they are not to be `pooled`.
        """
        if not len(tiles):
            shape: tuple[int, ...] = (0, self.embed_dim)
            if not pooled:
                vit, size_px = self._config.vit, self.tile_spec.size_px
                shape = (0, 1 + vit.registers + (size_px // vit.patch_px) ** 2, vit.width)
            return torch.zeros(shape, dtype=torch.float32, device=self._device), limit
        while True:
            with torch.inference_mode(), full_precision(self._device):
                try:
                    parts = [
                        self._run_padded(part.to(self._device, non_blocking=True), pooled)
                        for part in torch.split(tiles, min(limit, self._whole_batch or limit))
                    ]
                    return (parts[0] if len(parts) == 1 else torch.cat(parts)), limit
                except torch.cuda.OutOfMemoryError as error:
                    if limit == 1:
                        raise ModelError(
                            f"{self._device} has no memory left for a single tile ({error}). Free"
                            ' some, or load the model with dtype="bfloat16" or device="cpu"'
                        ) from error
            # Outside of the handler, so that the failed tensors are gone.
            limit = (min(limit, len(tiles)) + 1) // 2
            torch.cuda.empty_cache()
            _logger.warning("%s is out of memory: going on with %d tiles", self._device, limit)

    def _run_padded(self, tiles: Tensor, pooled: bool) -> Tensor:
        missing = (self._whole_batch or len(tiles)) - len(tiles)
        if missing <= 0:
            return self._run(tiles, pooled)
        # What was compiled for one batch size would be compiled again for another.
        padded = nn.functional.pad(tiles, (0, 0, 0, 0, 0, 0, 0, missing))
        return self._run(padded, pooled)[: len(tiles)]
