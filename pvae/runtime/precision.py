"""Mixed precision: networks multiply in fewer bits (TF32, bfloat16); log-densities and all else stay in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pvae.errors import UserError, nearest, param

PRECISIONS = ("float32", "tf32", "bf16")

# The products of network layers; those inside a density, as with a normal's factor, stay in float32.
LAYERS = frozenset(
    getattr(functional, name)
    for name in ("linear", "bilinear", *(f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)))
)


def check_precision(name: str, device: torch.device | None = None) -> None:
    """Refuse an unknown precision and one that the device does not have."""
    if name not in PRECISIONS:
        raise UserError(f"unknown precision '{name}'{nearest(name, PRECISIONS)}")
    if device and name == "tf32" and device.type != "cuda":
        need = f"{param('precision', name)} needs CUDA, but the device is {device.type}"
        raise UserError(need, hint="use float32 or bf16")


def matmul_precision(name: str, device: torch.device) -> AbstractContextManager[Any]:
    """Let network layers multiply in a precision inside a block, forward and backward; their results are float32.

    ``tf32`` keeps NVIDIA's 10 bits of mantissa inside a product, ``bf16`` (autocast) 7 bits of each factor.
    """
    check_precision(name, device)
    if name == "bf16":
        return _BFloat16(device)
    return _tf32() if name == "tf32" else nullcontext()


@contextmanager
def _tf32() -> Iterator[None]:
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


class _BFloat16(TorchFunctionMode):
    """Run each network layer under autocast."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in LAYERS:
            return func(*args, **kwargs)
        with torch.autocast(self.device.type, torch.bfloat16):
            return func(*args, **kwargs).to((args[0] if args else kwargs["input"]).dtype)
