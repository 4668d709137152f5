"""The client's step as a differentiable function, what the server sees of it, and captured updates."""

from invlib.federated.capture import (
    from_arrays,
    from_gradients,
    from_state_dicts,
    load_observation,
    save_observation,
)
from invlib.federated.protocols import FedAvg, FedSGD, observe
from invlib.federated.record import Recording, record_client
from invlib.federated.rounds import several_rounds
from invlib.federated.surrogate import as_one_gradient, fitted_place

__all__ = [
    "FedAvg",
    "FedSGD",
    "Recording",
    "as_one_gradient",
    "fitted_place",
    "from_arrays",
    "from_gradients",
    "from_state_dicts",
    "load_observation",
    "observe",
    "record_client",
    "save_observation",
    "several_rounds",
]
