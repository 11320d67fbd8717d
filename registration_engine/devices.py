"""The device a caller names."""

from __future__ import annotations

import torch

from registration_engine.errors import InvalidRequestError


def device_named(name: str) -> torch.device:
    """ "auto" takes an accelerator where there is one.

    Raises
    ------
    InvalidRequestError
        No such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidRequestError(f"Device: got {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        there = ["auto", "cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
        raise InvalidRequestError(f"Device: got {name!r}, expected one of those here: {', '.join(there)}")
    return device


def autocast_type(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device multiplies it in hardware: accelerators, and processors with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.bfloat16
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("amx_bf16") or able.get("avx512_bf16") else None


def describe_device(name: str) -> str:
    """What decides the last bits of a result: the accelerator's model, or the processor's vector unit and threads."""
    device = device_named(name)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
