"""The kernels in Triton: each reads its input once, and lists of tensors are never concatenated.

Importing this module imports Triton; `invlib.kernels` does so when it first needs to, checks the arguments
and holds the formulas. Two things shape the code:

*One launch per list.* A network has dozens of parameters, most of them small. The list is cut into tiles of
at most `CHUNK_SIZE` numbers, each inside one tensor; a program looks up its tile and finds the tensor's
address in a table of pointers. Every program writes the partial sum of its tile and a second pass adds those
up: no atomics, so that equal input gives equal bits.

*Restarts together.* Every operation is an `autograd.Function` with a rule for `torch.func.vmap` that turns
the batch into a leading dimension ("rows") of the same launch. Backward calls another such Function, because
`vmap(grad(...))` batches the backward pass too. That second Function has no derivative.
"""

from invlib.kernels.triton.adam import adam_step_
from invlib.kernels.triton.common import INTERPRETED
from invlib.kernels.triton.gradients import gradient_statistics, squared_difference
from invlib.kernels.triton.variation import total_variation

__all__ = ["INTERPRETED", "adam_step_", "gradient_statistics", "squared_difference", "total_variation"]
