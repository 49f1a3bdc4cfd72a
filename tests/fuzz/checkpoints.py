"""Cases of damaged weights, model configurations and classifiers, and what is done with each."""

import io
import json
import os
import pickle
import pickletools
import tempfile
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch
from support.models import TINY, random_state

from fuzz.bags import damaged_safetensors_header
from fuzz.streams import cut, filled, flipped, moved, nothing, tail
from xmag.encoder import load_model
from xmag.hub.registry import SCHEMA, ModelConfig
from xmag.mil import MILClassifier, aggregator
from xmag.provenance import Provenance

DESCRIPTION, WEIGHTS = "classifier.json", "classifier.safetensors"
FINE = "loaded"
THEIR_PRINTS = r"(?!)"
THEIR_WARNINGS = (UserWarning,)
"""What torch says of pickles that it did not write itself."""
_MOST_PX = 560
_ANY = (flipped, filled, cut, moved, tail, nothing)
_MARKER = "executed-by-a-pickle"
_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2, 3, 14, 1 << 20, 1 << 40, 1 << 70, 0.5, 1e308, -1e-9, float("nan"),
    float("inf"),
    "", "gelu", "abmil", "mean", "12", [], [1], [1, 2, 3], [[0] * 9] * 9, {}, {"a": 1},
    {"name": "abmil", "options": {}},
)  # fmt: skip
_GLOBALS = (
    b"torch._utils\n_rebuild_parameter", b"torch\nTensor", b"torch\nSize", b"torch\ndevice",
    b"torch._utils\n_rebuild_sparse_tensor", b"torch._utils\n_rebuild_meta_tensor_no_storage",
    b"torch._utils\n_rebuild_qtensor", b"torch._tensor\n_rebuild_from_type_v2",
    b"collections\nCounter",
    b"os\nsystem", b"builtins\neval", b"builtins\nexec", b"posix\nsystem", b"subprocess\nPopen",
    b"torch\nload", b"numpy\nload", b"torch.storage\n_load_from_bytes", b"_codecs\nencode",
    b"torch\nDoubleStorage", b"torch\nBFloat16Storage", b"torch.nn.parameter\nParameter", b"\n",
    b"x",
)  # fmt: skip


@cache
def seeds() -> dict[str, bytes]:
    """Small valid weights in every container, a config.json, and a classifier's two files."""
    state = random_state(TINY)
    found = {
        "model.safetensors": safetensors.torch.save(state),
        "config.json": json.dumps({"format": SCHEMA, **ModelConfig(vit=TINY).to_dict()}).encode(),
    }
    for name, content, options in (
        ("model.pth", state, {}),
        ("legacy.pt", state, {"_use_new_zipfile_serialization": False}),
        ("training.bin", {"ema": {f"model.{k}": v for k, v in state.items()}, "epoch": 3}, {}),
    ):
        buffer = io.BytesIO()
        torch.save(content, buffer, **options)
        found[name] = buffer.getvalue()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = aggregator("abmil", in_dim=8, classes=2)
    classifier = MILClassifier.from_module(
        module, classes=["a", "b"], in_dim=8, device="cpu", epochs=2, lr=1e-3, random_state=0,
        provenance=Provenance({"weights_sha256": "0" * 64}, {}),
    )  # fmt: skip
    classifier.history_ = [{"epoch": 0, "train_loss": 0.7, "validation_loss": None}]
    classifier.best_epoch_ = 0
    with tempfile.TemporaryDirectory() as folder:
        classifier.save(folder)
        for name in (DESCRIPTION, WEIGHTS):
            found[name] = (Path(folder) / name).read_bytes()
    return found


def make(originals: Mapping[str, bytes], number: int, rng: Random) -> tuple[str, bytes]:
    """(name, content) of a damaged file."""
    name = rng.choice(sorted(originals))
    data = originals[name]
    if rng.random() < 0.25:
        return name, rng.choice(_ANY)(data, rng)
    if name.endswith(".json"):
        return name, _damaged_json(data, rng)
    if name.endswith(".safetensors"):
        return name, damaged_safetensors_header(data, rng)
    if rng.random() < 0.15:
        return name, _malicious(rng)
    if name == "legacy.pt":
        return name, _damaged_pickle(data, rng)
    return name, _damaged_zip(data, rng)


def outcome(path: Path) -> str:
    """What became of a file, in a word; raises what is no XmagError."""
    try:
        if path.name in (DESCRIPTION, WEIGHTS):
            _complete(path, (DESCRIPTION, WEIGHTS))
            classifier = MILClassifier.load(path.parent, device="cpu")
            assert all(torch.isfinite(p).all() for p in classifier.aggregator_.parameters())
        elif path.name == "config.json":
            _complete(path, ("config.json", "model.safetensors"))
            encoder = load_model(path.parent, device="cpu")
            if encoder.tile_spec.size_px <= _MOST_PX:
                side = encoder.tile_spec.size_px
                encoder.embed(torch.zeros((1, side, side, 3), dtype=torch.uint8))
        else:
            encoder = load_model(path, config=TINY, device="cpu")
            assert all(torch.isfinite(p).all() for p in encoder.vit.parameters())
    finally:
        for name in (DESCRIPTION, WEIGHTS, "config.json", "model.safetensors"):
            if name != path.name:
                (path.parent / name).unlink(missing_ok=True)
        assert not Path(_MARKER).exists(), "a pickle ran code"
    return "loaded"


def _complete(path: Path, names: tuple[str, ...]) -> None:
    """Put the undamaged files beside a damaged one that go with it."""
    for name in names:
        if name != path.name:
            (path.parent / name).write_bytes(seeds()[name])


def _damaged_json(data: bytes, rng: Random) -> bytes:
    """JSON in which a value is another, is gone, or is nested for ever."""
    values = json.loads(data)
    if rng.random() < 0.1:
        return rng.choice(
            (b"[" * 100_000, b"null", b"[]", b"{}", b'"a"', b"NaN", b'{"a":' * 99_999, b"1" * 9999)
        )
    for _ in range(rng.choice((1, 1, 2))):
        node, key = values, rng.choice(sorted(values))
        while isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
            node = node[key]
            key = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if rng.random() < 0.15:
            del node[key]
        elif isinstance(node, dict) and rng.random() < 0.1:
            node[rng.choice(("x", "", "auto_map", "architectures"))] = rng.choice(_VALUES)
        else:
            node[key] = rng.choice(_VALUES)
        if not values:
            break
    return json.dumps(values).encode()


def _damaged_zip(data: bytes, rng: Random) -> bytes:
    """A zip as torch writes it, whose pickle or records are others, with checksums that fit."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    packing = zipfile.ZIP_STORED
    match rng.randrange(6):
        case 0:
            name = rng.choice(sorted(records))
            records[name] = rng.choice(_ANY)(records[name], rng)
        case 1:
            del records[rng.choice(sorted(records))]
        case 2:
            packing = zipfile.ZIP_DEFLATED
            name = rng.choice([n for n in records if "/data/" in n])
            records[name] = bytes(rng.choice((1 << 20, 1 << 28)))
        case _:
            records[pickled] = _damaged_pickle(records[pickled], rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return out.getvalue()


def _damaged_pickle(data: bytes, rng: Random) -> bytes:
    """A pickle with another number, name or opcode."""
    out = bytearray(data)
    places: dict[str, list[tuple[int, Any]]] = {}
    try:
        for opcode, argument, at in pickletools.genops(data):
            places.setdefault(opcode.name, []).append((at, argument))
    except ValueError:
        pass  # a file of torch's older format is several pickles, and bytes that are none
    kind = rng.choice(("int", "int", "global", "opcode", "bytes"))
    if kind == "int":
        ints = [
            (at, size)
            for name, size in (("BININT1", 1), ("BININT2", 2), ("BININT", 4))
            for at, _ in places.get(name, ())
        ]
        for at, size in rng.sample(ints, min(len(ints), rng.choice((1, 2)))):
            out[at + 1 : at + 1 + size] = rng.choice(
                (bytes(size), b"\xff" * size, b"\xff" * (size - 1) + b"\x7f", rng.randbytes(size))
            )
    elif kind == "global" and places.get("GLOBAL"):
        at, argument = rng.choice(places["GLOBAL"])
        out[at + 1 : at + 1 + len(argument)] = rng.choice(_GLOBALS)
    elif kind == "opcode" and places:
        at, _ = rng.choice(rng.choice(list(places.values())))
        out[at] = rng.choice(pickletools.opcodes).code.encode("latin-1")[0]
    else:
        return rng.choice(_ANY)(data, rng)
    return bytes(out)


class _Command:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {_MARKER}",)


def _malicious(rng: Random) -> bytes:
    """A pickle that would run a command, in any container."""
    content = rng.choice(
        (_Command(), {"state_dict": _Command()}, {"a": torch.zeros(2), "b": _Command()})
    )
    match rng.randrange(4):
        case 0:
            return pickle.dumps(content, protocol=rng.choice((0, 2, 4)))
        case 1:
            return (
                pickle.dumps(0x1950A86A20F9469CFC6C, 2)
                + pickle.dumps(1001, 2)
                + pickle.dumps(content, 2)
            )
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=rng.random() < 0.7)
    return buffer.getvalue()
