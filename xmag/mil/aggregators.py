"""Registry of MIL aggregators: made by name, and described as a JSON config."""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from xmag.errors import InputError
from xmag.mil.clam import CLAMSB
from xmag.mil.pooling import ABMIL, Aggregator, MaxPool, MeanPool
from xmag.mil.transmil import TransMIL

AGGREGATORS: Mapping[str, type[Aggregator]] = MappingProxyType(
    {"abmil": ABMIL, "mean": MeanPool, "max": MaxPool, "transmil": TransMIL, "clam_sb": CLAMSB}
)
"""Aggregator classes by name."""

_LARGEST_DIM = 2**20


def aggregator(
    name_or_module: str | nn.Module, *, in_dim: int, classes: int, **options: Any
) -> nn.Module:
    """A new aggregator by its name, with fresh weights; a module of the user's own as it is.

    An aggregator is a module with ``forward(features, mask, labels=None) -> MILOutput``: features
    are float (B, N, D), mask is bool (B, N) and True on tiles, labels are int64 (B,). Its attribute
    `batched` is False where B has to be 1. Fresh weights come from torch's default generator.

    Args:
        name_or_module: One of AGGREGATORS, or a module.
        in_dim: D, the width of features.
        classes: C, the number of classes.
        options: Of the named aggregator's constructor: its sizes, its dropout.

    Raises InputError for an unknown name or option, or a value out of its range.
    """
    return with_outputs(name_or_module, in_dim, classes, options, least=2)


def with_outputs(
    name_or_module: str | nn.Module,
    in_dim: int,
    outputs: int,
    options: Mapping[str, Any],
    *,
    least: int = 1,
    last_layer: type[nn.Module] = nn.Linear,
) -> nn.Module:
    """An `aggregator` of `least` outputs or more; those by name end in a `last_layer`."""
    for what, size, lowest in (("in_dim", in_dim, 1), ("classes", outputs, least)):
        if not _is_int(size) or not lowest <= size <= _LARGEST_DIM:
            raise InputError(
                f"{what} is {size!r}; expected an int from {lowest} to {_LARGEST_DIM:,}"
            )
    if isinstance(name_or_module, nn.Module):
        if options:
            raise InputError(
                f"options {sorted(options)} were given beside a module; set up the module before"
            )
        return name_or_module
    kind = AGGREGATORS.get(name_or_module) if isinstance(name_or_module, str) else None
    if kind is None:
        raise InputError(
            f"aggregator is {name_or_module!r}; expected one of {', '.join(map(repr, AGGREGATORS))}"
            " or a torch.nn.Module"
        )
    _check_options(str(name_or_module), kind, options)
    made = kind(in_dim=in_dim, classes=outputs, **options)
    if last_layer is not nn.Linear:
        assert isinstance(made.head, nn.Linear)
        made.head = last_layer(made.head.in_features, outputs)
    return made


def aggregator_config(module: nn.Module) -> dict[str, Any]:
    """The name and options of an aggregator as plain JSON: ``{"name": ..., "options": {...}}``.

    ``aggregator(config["name"], in_dim=..., classes=..., **config["options"])`` makes one like it,
    with other weights. Raises InputError for a module of the user's own.
    """
    for name, kind in AGGREGATORS.items():
        if type(module) is kind:
            return {"name": name, "options": dict(module.options)}
    raise InputError(
        f"the aggregator is a {type(module).__name__}, which xmag cannot describe; expected one of"
        f" {', '.join(kind.__name__ for kind in AGGREGATORS.values())}"
    )


def _check_options(name: str, kind: type[nn.Module], options: Mapping[str, Any]) -> None:
    known = set(inspect.signature(kind).parameters) - {"in_dim", "classes"}
    if unknown := sorted(set(options) - known):
        raise InputError(f"{name!r} has no option {unknown[0]!r}; expected one of {sorted(known)}")
    for key, value in options.items():
        if fault := _fault(key, value):
            raise InputError(f"{key} of {name!r} is {value!r}; expected {fault}")
    heads, dim = options.get("heads", 8), options.get("embed_dim", 512)
    if "heads" in known and dim % heads:
        raise InputError(
            f"embed_dim of {name!r} is {dim} and heads is {heads}; expected a multiple of heads"
        )


def _fault(key: str, value: Any) -> str | None:
    """The expected range of an option, for an error message; None where `value` is in it."""
    number = _is_int(value) or isinstance(value, float)
    if key == "dropout":
        return None if number and 0 <= value < 1 else "a number from 0 on, and below 1"
    if key == "bag_weight":
        return None if number and 0 < value <= 1 else "a number above 0, and up to 1"
    if key == "subtyping":
        return None if isinstance(value, bool) else "True or False"
    if key == "instance_loss":
        return None if value in ("svm", "ce") else '"svm" or "ce"'
    good = _is_int(value) and 1 <= value <= _LARGEST_DIM
    return None if good else f"an int from 1 to {_LARGEST_DIM:,}"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
