"""The dtype that the matrix products run in."""

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_precision(requested: str, device: torch.device) -> tuple[str, str]:
    """`auto` -> what the device computes natively; returns the precision and why."""
    if requested != "auto":
        return requested, "requested"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{name} computes bf16"
        return "fp16", f"{name} has no bf16"
    capabilities = torch.backends.cpu.get_cpu_capability()
    if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return "bf16", f"the CPU ({capabilities}) computes bf16"
    return "fp32", f"the CPU ({capabilities}) has no bf16 arithmetic"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context of forward passes: parameters stay as they are, products run in `precision`."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])
