"""What the Triton kernels share."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from invlib.errors import DeviceError

CHUNK_SIZE = 4096  # numbers of one tensor that a program sums, or writes
BLOCK_SIZE = 1024  # numbers that it holds at a time

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def launch(kernel: Any, programs: int, like: Tensor, *args: Any, **constants: Any) -> None:
    """Start a kernel on the device that holds `like`; every launch of this module passes here."""
    with torch.cuda.device_of(like):
        kernel[(programs,)](*args, **constants)


@triton.jit
def sign(x):  # type: ignore[no-untyped-def]
    """Return the sign of x, 0 for 0 and for NaN."""
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)


def to_front(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    """Bring vmap's dimension to the front; a tensor that has none is repeated without a copy."""
    return tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def unfold(tensor: Tensor, batch: int, rows: int) -> Tensor:
    """Undo the folding of vmap's dimension into rows that were there before."""
    return tensor.unflatten(0, (batch, rows)) if rows else tensor


class LastDerivative(Function):
    """A gradient that has no derivative of its own: asking for one raises `DeviceError`."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        """Raise `DeviceError`."""
        raise DeviceError(
            "the Triton kernels are differentiable once; use impl='reference' for a second derivative"
        )


# Triton decides at each definition whether to compile or to interpret: for its own functions when it is
# imported, for ours here.
INTERPRETED = not isinstance(sign, triton.JITFunction)
if isinstance(tl.sum, triton.JITFunction) == INTERPRETED:
    raise ImportError("TRITON_INTERPRET was set after triton was imported; set it before")
