"""Put other parameters in the place of a model's own."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def replace_parameters(model: nn.Module, change: Callable[[nn.Parameter], Tensor]) -> None:
    """Every parameter becomes one that holds `change` of it, in place. Tied ones stay one."""
    made: dict[int, nn.Parameter] = {}
    kept = []  # ids stay unique as long as the tensors live
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(change(parameter), requires_grad=parameter.requires_grad)
                kept.append(parameter)
            module._parameters[key] = made[id(parameter)]
