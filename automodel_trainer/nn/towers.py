"""The towers of a model: its encoders of pictures, videos and sound, beside the decoder."""

from __future__ import annotations

from weakref import WeakKeyDictionary, ref

from torch import nn

from automodel_trainer.nn.blocks import modules_around

_MEDIA = ("pixel_values", "input_features", "input_values", "audio")  # main inputs of transformers' encoders begin so

# Each log step asks. A tower may hold its model, by hooks of FSDP: a model that it is kept for would never be freed.
_known: WeakKeyDictionary[nn.Module, list[ref[nn.Module]]] = WeakKeyDictionary()


def tower_of(model: nn.Module) -> nn.Module | None:
    """The image encoder beside the decoder of the first transformers model in `model`; None if there is none."""
    return next(iter(towers_of(model)), None)


def towers_of(model: nn.Module) -> list[nn.Module]:
    """That encoder, and then the others of that model: a second one for large pictures, say, or one for sound.

    Transformers names one for each kind of input (`get_encoder(modality=…)`). Others are models of their own whose main
    input is no text. Without an image encoder there are none.
    """
    if model not in _known:
        _known[model] = [ref(tower) for tower in _find(model)]
    return [tower for kept in _known[model] if (tower := kept()) is not None]


def _find(model: nn.Module) -> list[nn.Module]:
    for root in model.modules():
        if hasattr(type(root), "get_encoder"):  # not of the object: PEFT's pass such calls on
            decoder = root.get_decoder()  # type: ignore[operator]
            named = [root.get_encoder(modality=kind) for kind in ("image", "video", "audio")]  # type: ignore[operator]
            if named[0] is None or named[0] is root or named[0] is decoder:
                return []
            around = [root.get_submodule(name) for name in modules_around(root, [decoder])]
            return _outermost([*named, *filter(_reads_media, root.modules())], [*around, *decoder.modules()])
    return []


def _reads_media(module: nn.Module) -> bool:
    name = getattr(type(module), "main_input_name", None)
    return isinstance(name, str) and name.startswith(_MEDIA)


def _outermost(found: list[nn.Module], others: list[nn.Module]) -> list[nn.Module]:
    """The first of `found`, and those that are neither inside one before them nor among `others`."""
    kept, inside = [found[0]], {id(module) for module in (*found[0].modules(), *others)}
    for module in found[1:]:
        if module is not None and id(module) not in inside:
            kept.append(module)
            inside |= set(map(id, module.modules()))
    return kept
