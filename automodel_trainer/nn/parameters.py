"""Replace the parameters of a model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def replace_parameters(model: nn.Module, change: Callable[[nn.Parameter], Tensor]) -> None:
    """Replace every parameter `p` of the model, in place, with a parameter that holds `change(p)`.

    Tied parameters stay tied: `change` is called once for all of them. Shapes are arbitrary, before and after.
    """
    made: dict[int, nn.Parameter] = {}
    kept = []  # keeps the old parameters alive, because an id is unique only while its object lives
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(change(parameter), requires_grad=parameter.requires_grad)
                kept.append(parameter)
            module.register_parameter(key, made[id(parameter)])
