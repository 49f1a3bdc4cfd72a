"""Exponential moving average (EMA) of a network's weights."""

import copy

import torch
from torch import nn

from xmag.errors import InputError


class Ema:
    """Exponential moving average (EMA) of a module's parameters and buffers, in float32.

    `module` is a frozen copy that holds the average; call `update` after the optimizer's step.
    Integer buffers (counters) are copied as they are.
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"the decay of an average is {decay}; expected 0 <= decay < 1")
        self.decay = decay
        self.module = copy.deepcopy(module).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, *, step: int | None = None) -> None:
        """Move the average towards `module`: average = decay * average + (1 - decay) * module.

        With the number of a `step` the decay is at most (1 + step) / (10 + step): the first
        weights, which know nothing, would otherwise stay in the average for long.
        """
        decay = self.decay if step is None else min(self.decay, (1 + step) / (10 + step))
        now = module.state_dict()
        for name, mean in self.module.state_dict().items():
            value = now[name].detach().to(mean.device)
            if mean.is_floating_point():
                mean.lerp_(value.to(mean.dtype), 1 - decay)
            else:
                mean.copy_(value)
