"""The log-odds of a label: cross-entropy without the factor that vanishes where a network is sure."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic


def log_odds(logits: Tensor, labels: Tensor, *, alpha: float = 1.0) -> Tensor:
    r"""Return the mean over images of :math:`\log \sum_{c \neq y} e^{z_c} - \alpha z_y`.

    Its gradient has the direction of cross-entropy's, image by image: with :math:`p` the softmax of
    the logits :math:`z`,

    .. math:: \nabla_z\, \mathrm{CE} = p - e_y = (1 - p_y)\,(q - e_y) = (1 - p_y)\, \nabla_z \log
              \tfrac{1 - p_y}{p_y}

    with :math:`q` the softmax over the other classes. The factor :math:`1 - p_y` of a network that is sure of
    its label is lost in single precision; :math:`q - e_y` is not.

    Args:
        logits: ``(N, classes)``, two classes at least.
        labels: int64 ``(N,)``.
        alpha: of the label's logit; 1 but where rounding has changed the client's own :math:`p_y`.
    """
    if has_torch_function_variadic(logits, labels):
        # As torch's own functions do, so that a stack of restarts can put its own sum in the place.
        answer: Tensor = handle_torch_function(log_odds, (logits, labels), logits, labels, alpha=alpha)
        return answer
    own = labels.unsqueeze(-1)
    others = logits.scatter(-1, own, -torch.inf).logsumexp(-1)
    return (others - alpha * logits.gather(-1, own).squeeze(-1)).mean()
