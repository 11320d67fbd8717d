"""The paper's network: a 3D U-Net from two images on one grid to a displacement field.

References
----------
The paper, sections 2.1.1 and 2.2, figures 2 and 11; Çiçek et al., 3D U-Net, MICCAI 2016.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu, max_pool3d
from torch.utils.checkpoint import checkpoint

from registration_engine.errors import InvalidVolumeError

MULTIPLE = 16
"""Each axis must be a multiple of this: four levels, each half the one above."""
_SLOPE = 0.2
_FLOW_SPREAD = 1e-5  # an untrained network starts at the identity


@dataclass(frozen=True)
class Architecture:
    """Channels per level, one convolution each: encoder from full resolution down, decoder back up."""

    encoder: tuple[int, ...]
    bottleneck: int
    decoder: tuple[int, ...]
    refinement: tuple[int, ...] = (16, 16, 16)


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "teacher": Architecture((16, 32, 32, 64), 64, (64, 32, 32, 16)),
        "student": Architecture((16, 24, 24, 32), 32, (32, 24, 24, 16)),
    }
)


class UNet(nn.Module):
    """Predicts where each voxel of the fixed image lies in the moving one.

    Parameters
    ----------
    checkpointing
        Recompute activations in the backward pass: about a third of the memory for a third more time.
    autocast
        A type such as `torch.bfloat16` to run the convolutions in; the result stays float32. Only for devices that
        have it in hardware: a CPU without it is a hundred times slower.
    channels_last
        Keep activations in channels-last order, which tensor cores want.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        checkpointing: bool = False,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.architecture, self.checkpointing, self.autocast = architecture, checkpointing, autocast
        self.channels_last = channels_last
        encoder, decoder = architecture.encoder, architecture.decoder
        above = (2, *encoder[:-1])
        self.encoder = nn.ModuleList(_conv(i, o) for i, o in zip(above, encoder, strict=True))
        self.bottleneck = _conv(encoder[-1], architecture.bottleneck)
        below = (architecture.bottleneck, *decoder[:-1])
        self.decoder = nn.ModuleList(
            _conv(i + skip, o) for i, skip, o in zip(below, reversed(encoder), decoder, strict=True)
        )
        before = (decoder[-1], *architecture.refinement[:-1])
        self.refinement = nn.ModuleList(_conv(i, o) for i, o in zip(before, architecture.refinement, strict=True))
        self.flow = _conv(architecture.refinement[-1], 3)
        for convolution in self.modules():
            if isinstance(convolution, nn.Conv3d):
                nn.init.kaiming_normal_(convolution.weight, a=_SLOPE)
                nn.init.zeros_(cast(Tensor, convolution.bias))
        nn.init.normal_(self.flow.weight, std=_FLOW_SPREAD)
        if channels_last:
            for convolution in self.modules():
                if isinstance(convolution, nn.Conv3d):
                    convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last_3d)

    def forward(self, pair: Tensor) -> Tensor:
        """Displacement (N, 3, Z, Y, X) in voxels, components (i, j, k), of pairs (N, 2, Z, Y, X) in 0…1.

        Channel 0 is the fixed image, channel 1 the moving one, on one grid.

        Raises
        ------
        InvalidVolumeError
            An axis is no multiple of 16.
        """
        if pair.ndim != 5 or pair.shape[1] != 2 or any(n % MULTIPLE or not n for n in pair.shape[2:]):
            raise InvalidVolumeError(
                f"U-Net input: got shape {tuple(pair.shape)}, expected (N, 2, Z, Y, X) in multiples of {MULTIPLE}"
            )
        if self.channels_last:
            pair = pair.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(pair.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            x, skips = pair, []
            for convolution in self.encoder:
                skips.append(self._block(convolution, x))
                x = max_pool3d(skips[-1], 2)
            x = self._block(self.bottleneck, x)
            for convolution in self.decoder:
                x = self._block(convolution, x, skips.pop())
            for convolution in self.refinement:
                x = self._block(convolution, x)
            flow: Tensor = self.flow(x)
        return flow.float() if self.autocast is not None else flow

    def _block(self, convolution: nn.Module, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(_activated, convolution, x, skip, use_reentrant=False))
        return _activated(convolution, x, skip)


def parameters_of(model: nn.Module) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in model.parameters())


def _conv(channels_in: int, channels_out: int) -> nn.Conv3d:
    return nn.Conv3d(channels_in, channels_out, kernel_size=3, padding=1)


def _activated(convolution: nn.Module, x: Tensor, skip: Tensor | None) -> Tensor:
    if skip is not None:
        x = torch.cat([interpolate(x, scale_factor=2.0, mode="nearest"), skip], dim=1)
    return leaky_relu(convolution(x), _SLOPE)
