r"""The operations that run at every step of an attack besides the network itself.

Each is a quartet: a reference in plain torch (`invlib.kernels.reference`), a Triton version for the GPU
(`invlib.kernels.triton`), a test that holds the second to the first, and a benchmark. Which one runs is
decided in each call, by :func:`choose`: ``impl=None`` takes Triton for CUDA tensors of a supported dtype and
the reference for everything else, for lists that mix dtypes, and while a step is being compiled or captured
as a CUDA graph; ``impl="reference"`` and ``impl="triton"`` raise where that cannot run. Triton is
imported only when it is about to run. With ``TRITON_INTERPRET=1`` in the environment ``impl="triton"`` also
runs on a CPU, slowly, which is how its tests run without a GPU; an automatic choice on a CPU is the reference
all the same.

All of them work under `torch.func.vmap` and `torch.func.grad_and_value`. The Triton versions are
differentiable once: an attack needs the second derivative of the network, never that of the distance.
"""

from invlib.kernels.dispatch import (
    Impl,
    adam_step_,
    choose,
    gradient_statistics,
    squared_difference,
    total_variation,
)

__all__ = [
    "Impl",
    "adam_step_",
    "choose",
    "gradient_statistics",
    "squared_difference",
    "total_variation",
]
