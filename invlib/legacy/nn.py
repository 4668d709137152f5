"""The networks of 2020 by name, and one that runs with the parameters it is given."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.nn as tnn
from torch import Tensor
from torch.func import functional_call

from invlib.legacy.utils import set_random_seed
from invlib.models import zoo
from invlib.models.weights import from_2020


def construct_model(
    model: str,
    num_classes: int = 10,
    seed: int | None = None,
    num_channels: int = 3,
    modelkey: int | None = None,
    *,
    verbose: bool = False,
) -> tuple[tnn.Module, int]:
    """Build an untrained network by name, in training mode like any new module; return it and its seed.

    As in 2020 it seeds the global generators with `set_random_seed` and draws from torch's, so that the seed
    also fixes the starting points of a reconstruction that follows. The weights are those of 2020 too, but
    for MobileNet, DenseNet40, ConvNet8 to 32 and MNASNet's last layer. The network's ``load_state_dict``
    takes the tensors of 2020; those of DenseNet40 and iRevNet it refuses, for they compute something else.

    Args:
        model: a name of `invlib.models.names`, ``"ConvNet"`` (ConvNet64), ``"BeyondInferringMNIST"`` or
            ``"BeyondInferringCifar"``, which give probabilities for 28×28 images of 1 and 3 channels.
        num_classes: length of the output.
        seed: of the weights; None draws one from NumPy's global generator.
        num_channels: channels of the images.
        modelkey: the seed, in its place.
        verbose: print the seed.

    UnknownNameError where there is no such network.
    """
    key = seed if modelkey is None else modelkey
    if key is None:
        key = int(np.random.randint(2**32 - 10, dtype=np.int64))  # noqa: NPY002
    set_random_seed(key)
    if model in ("BeyondInferringMNIST", "BeyondInferringCifar"):
        network = _beyond_inferring(1 if model.endswith("MNIST") else 3, num_classes)
    else:
        name = "ConvNet64" if model == "ConvNet" else model
        network = zoo.assemble(name, num_classes=num_classes, in_channels=num_channels)
    if model.startswith("ConvNet"):
        set_random_seed(key)
        for name, module in network.named_children():
            # 2020 made this layer twice and kept the second.
            for _ in range(2 if name == "conv6" else 1):
                if isinstance(module, tnn.Conv2d | tnn.Linear):
                    module.reset_parameters()
    if model == "DenseNet121":
        tnn.init.zeros_(network.get_parameter("linear.bias"))
    network.register_load_state_dict_pre_hook(_rename)
    print(f"Model initialized with random key {key}.\n" if verbose else "", end="")
    return network.train(), key


def _rename(model: tnn.Module, state_dict: dict[str, Any], *_: object) -> None:
    renamed = from_2020(model, state_dict)
    state_dict.clear()
    state_dict.update(renamed)


def _beyond_inferring(channels: int, num_classes: int) -> tnn.Module:
    layers: dict[str, tnn.Module] = {}
    for i, (outputs, stride) in enumerate([(32, 2), (64, 1), (128, 2), (256, 1)]):
        layers[f"conv{i + 1}"] = tnn.Conv2d(channels, outputs, 3, stride=stride, padding=1)
        layers[f"relu{i}"] = tnn.LeakyReLU()
        channels = outputs
    layers |= {"flatt": tnn.Flatten(), "linear0": tnn.Linear(12544, 12544), "relu4": tnn.LeakyReLU()}
    layers |= {"linear1": tnn.Linear(12544, num_classes), "softmax": tnn.Softmax(dim=1)}
    return tnn.Sequential(OrderedDict(layers))


class MetaMonkey(tnn.Module):
    """Runs a network with other ``parameters`` (a mapping), which gradients flow through."""

    parameters: Mapping[str, Tensor]  # type: ignore[assignment]

    def __init__(self, net: tnn.Module) -> None:
        super().__init__()
        self.net, self.parameters = net, dict(net.named_parameters())

    def forward(self, inputs: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the output with these parameters, in the order of the network's; None takes its own."""
        names = [name for name, _ in self.net.named_parameters()]
        given = dict(zip(names, (parameters or self.parameters).values(), strict=True))
        output: Tensor = functional_call(self.net, given, (inputs,))
        return output
