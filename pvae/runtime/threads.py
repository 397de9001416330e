"""CPU threads: one thread for work whose operations are too small to share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Floating-point operations, or elements, of a mean operation below which further threads cost more than they save:
# they spin while one thread is in Python. Measured on two cores: SemiAmortized on 8 x 8 images has 0.3 million.
MIN_OP_SIZE = 400_000


class OpSizes(TorchDispatchMode):
    """Mean size of the operations in a block: floating-point operations of products, elements of other results."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.total = 0, 0

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += 1
        if flops := flop_registry.get(func._overloadpacket):
            self.total += flops(*args, **(kwargs or {}), out_val=result)
        elif isinstance(result, Tensor) and not func.is_view:
            self.total += result.numel()
        return result


@contextmanager
def cpu_threads(op_size: float) -> Iterator[None]:
    """Run a block on one CPU thread if its mean operation (`OpSizes`; NaN if unknown) is below `MIN_OP_SIZE`."""
    before = torch.get_num_threads()
    if before == 1 or not op_size < MIN_OP_SIZE:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
