"""A small version of a user's model: same architecture, one layer of each kind, narrow, with the same divisibility."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig

from automodel_trainer.nn.experts import CHOICES, COUNTS

HEAD_DIM = 16
MIN_LAYERS = 2
# Multi-head latent attention (arXiv 2405.04434) has sizes of its own, which do not follow from the hidden size.
_MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
_QUERY = ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim")  # the whole and its parts
_EMPTY_EXPERTS = "zero_expert_num"  # choices beside the experts that compute nothing (arXiv 2509.01322)
# Names of the numbers of heads, their size, and the number of groups; each family has its own.
_STATE_SPACE_HEADS = (
    ("mamba_n_heads", "mamba_d_head", "mamba_n_groups"),
    ("mamba_num_heads", "mamba_head_dim", "n_groups"),
    ("n_mamba_heads", "mamba_headdim", "mamba_ngroups"),
    ("num_heads", "head_dim", "n_groups"),
)
_AGAIN = ("hidden_size", "vocab_size")  # sizes that some configs say a second time, outside of their text part
_DEPTHS = ("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers")
_TOWER_DEPTHS = ("depth", "num_hidden_layers", "num_layers", "n_layers", "layers")
_NOISE = ("dropout", "drop_path", "pdrop", "layerdrop", "jitter")
_WIDTHS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "mlp_intermediate_size",
)


def shrink(
    config: PreTrainedConfig,
    ranks: int,
    length: int,
    vocab_size: int,
    layers: int = MIN_LAYERS,
    *,
    depth: bool = True,
    width: bool = True,
) -> PreTrainedConfig:
    """A small copy of `config`.

    Sizes that divide by `ranks` (heads, key heads, widths, experts) still do, and the others still do not. So a layout
    that refuses the original refuses the copy. Attention windows are made shorter than `length`, so that they matter.

    Args:
        config: of the user's model; it is not changed.
        ranks: the largest number of ranks that cuts a dimension.
        length: tokens of a row.
        vocab_size: how many token ids the batches use.
        layers: the least number of layers, if the original has so many.
        depth: False keeps the number of layers.
        width: False keeps the sizes of layers.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    hidden = getattr(text, "hidden_size", None)
    again = [name for name in _AGAIN if getattr(config, name, None) == getattr(text, name, -1)]
    kept = list(range(text.num_hidden_layers))
    with _one_size_of_layers(text, kept):
        if depth:
            kept[:] = _shrink_depth(text, max(layers, MIN_LAYERS))
        if width:
            _shrink_width(text, ranks)
    # Token ids of the batches must exist, and the vocabulary must be cut by as many ranks as before.
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if isinstance(value := getattr(text, name, None), int):
            setattr(text, name, alike(value, max(vocab_size, 4 * HEAD_DIM), ranks))
    for name in ("sliding_window", "attention_chunk_size"):
        if isinstance(value := getattr(text, name, None), int):
            setattr(text, name, min(value, max(2, length // 3)))
    for name in again:
        setattr(config, name, getattr(text, name))
    _silence_noise(text)
    text.use_cache = False  # keys and values are kept for generation only
    for tower in _towers(config, text):
        if depth:
            _shrink_tower_depth(tower, getattr(config, "vision_feature_layer", None))
        # Where a tower's own width is its embed_dim, its hidden size is what it hands to the decoder.
        out = "hidden_size" if hasattr(tower, "embed_dim") else "out_hidden_size"
        if width and getattr(tower, out, None) == hidden:
            setattr(tower, out, text.hidden_size)
        _silence_noise(tower)
    return config


def _towers(config: PreTrainedConfig, text: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configs of what lies beside the decoder: towers for pictures and sound."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return [part for part in parts if isinstance(part, PreTrainedConfig) and part is not text]


def _shrink_tower_depth(tower: PreTrainedConfig, taken: int | list[int] | None) -> None:
    """Keep a few layers of a tower. Widths stay: pictures of the user's processor must fit.

    Args:
        taken: which layers' outputs the model takes, counted from the end where negative.
    """
    name = next((name for name in _TOWER_DEPTHS if isinstance(getattr(tower, name, None), int)), None)
    if name is None:
        return
    layers = getattr(tower, name)
    # Lists of layers keep their lengths: each may have modules of its own.
    named = {
        key: value
        for key, value in tower.to_dict().items()
        if key.endswith(("indexes", "indices", "index")) and isinstance(value, list) and value and max(value) < layers
    }
    outputs = [taken] if isinstance(taken, int) else list(taken or ())
    depth = min(layers, max([MIN_LAYERS, *(len(v) + 1 for v in named.values()), *(abs(v) for v in outputs)]))
    setattr(tower, name, depth)
    for key, value in named.items():
        setattr(tower, key, list(range(depth - len(value), depth)))


def _shrink_width(text: PreTrainedConfig, ranks: int) -> None:
    hidden = text.hidden_size
    if getattr(text, "num_attention_heads", None):
        _shrink_heads(text, ranks)
    else:  # layers without attention
        text.hidden_size = 4 * HEAD_DIM
    _follow(text, hidden)
    _shrink_linear_heads(text, ranks)
    for name in _WIDTHS:
        if isinstance(value := getattr(text, name, None), int):
            setattr(text, name, alike(value, 4 * HEAD_DIM, ranks))
    _shrink_experts(text, ranks)
    _shrink_state_spaces(text)


def _follow(config: PreTrainedConfig, hidden: int) -> None:
    """Shrink what is a multiple of the hidden size, which was `hidden`, with it."""
    for name in ("embedding_dim", "attention_hidden_size"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value and value % hidden == 0:
            setattr(config, name, value // hidden * config.hidden_size)
            if isinstance(getattr(config, "attention_head_dim", None), int):
                config.attention_head_dim = getattr(config, name) // config.num_attention_heads


@contextmanager
def _one_size_of_layers(config: PreTrainedConfig, kept: list[int]) -> Iterator[None]:
    """Layers of several sizes have one meanwhile, and then sizes of their own again: other than the common ones.

    Args:
        kept: indices of the layers that are left in the end.
    """
    if not getattr(config, "is_heterogeneous", False):
        yield
        return
    sizes = {int(layer): size for layer, size in config.to_dict()["per_layer_config"].items()}
    config.per_layer_config = None  # reading a size that layers do not share raises
    both = any(_is_whole_query({name: getattr(config, name, 0) for name in _QUERY} | size) for size in sizes.values())
    yield
    if both:  # a quarter is rotated: the part must be exact
        config.qk_nope_head_dim = 3 * config.qk_rope_head_dim
        config.head_dim = 4 * config.qk_rope_head_dim
    own = {}
    for new, old in enumerate(kept):
        own[new] = dict(sizes.get(old, {}))
        for name, value in own[new].items():
            if isinstance(value, int) and not isinstance(value, bool):
                common = getattr(config, name, None)
                own[new][name] = 2 * common if name == "head_dim" and common else common or value
    config.per_layer_config = {layer: size for layer, size in own.items() if size}


def _is_whole_query(size: dict[str, Any]) -> bool:
    """Whether the heads of a layer with latent attention are as wide as both parts of a query, and not as one."""
    whole, *parts = (size.get(name) or 0 for name in _QUERY)
    return bool(all(parts)) and whole == sum(parts)


def alike(value: int, least: int, modulus: int) -> int:
    """The smallest number ≥ `least` with the same remainder by `modulus` as `value`, but never more than `value`."""
    return min(value, least + (value - least) % modulus)


def _shrink_depth(config: PreTrainedConfig, layers: int) -> list[int]:
    """Keep a layer of each kind; returns which."""
    depth = config.num_hidden_layers
    keep = _one_of_each(_kinds(config, depth), layers)
    per_layer = {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == depth and name != "architectures"
    }
    for name, value in per_layer.items():
        setattr(config, name, [value[i] for i in keep])
    # These count layers, or name them by index.
    if isinstance(dense := getattr(config, "first_k_dense_replace", None), int):
        config.first_k_dense_replace = min(dense, 1)
    if getattr(config, "mlp_only_layers", None):
        config.mlp_only_layers = [new for new, old in enumerate(keep) if old in config.mlp_only_layers]
    if shared := getattr(config, "num_kv_shared_layers", None):
        config.num_kv_shared_layers = sum(i >= depth - shared for i in keep)
    _set_depth(config, len(keep))
    return keep


def _set_depth(config: PreTrainedConfig, layers: int) -> None:
    """Set the number of layers; where a config counts those of an encoder and of a decoder apart, of both."""
    counts = [name for name in _DEPTHS if isinstance(getattr(config, name, None), int)]
    for name in counts:
        setattr(config, name, layers)
    if config.num_hidden_layers != layers:
        config.num_hidden_layers = layers


def _kinds(config: PreTrainedConfig, depth: int) -> list[Any]:
    """The kind of each layer. Layers of equal kind have the same architecture."""
    types = getattr(config, "layer_types", None) or [None] * depth
    mlps = getattr(config, "mlp_layer_types", None) or [None] * depth
    dense = getattr(config, "first_k_dense_replace", None) or 0
    shared = depth - (getattr(config, "num_kv_shared_layers", None) or 0)
    only = getattr(config, "mlp_only_layers", None) or []
    return [(types[i], mlps[i], i < dense, i in only, i >= shared) for i in range(depth)]


def _one_of_each(kinds: list[Any], layers: int) -> list[int]:
    first = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    more = [i for i in range(len(kinds)) if i not in first]
    return sorted(first + more[: max(0, layers - len(first))])


def _shrink_heads(config: PreTrainedConfig, ranks: int) -> None:
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    rotary = getattr(config, "head_dim", None) or config.hidden_size // heads
    small_keys, groups = _heads(heads, key_heads, ranks)
    latent = getattr(config, "kv_lora_rank", None) is not None
    whole_query = latent and _is_whole_query({name: getattr(config, name, None) for name in _QUERY})
    if latent:
        _shrink_latent(config, whole_query)
    if isinstance(rotary_dim := getattr(config, "rotary_dim", None), int):
        config.rotary_dim = min(rotary_dim, HEAD_DIM)
    config.num_attention_heads = small_keys * groups
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = small_keys
    # Some configs compute it from the other sizes; under latent attention it is the size of the rotated part.
    if getattr(config, "head_dim", None) is not None and not isinstance(getattr(type(config), "head_dim", 0), property):
        part = config.qk_nope_head_dim + config.qk_rope_head_dim if whole_query else _MLA["qk_rope_head_dim"]
        config.head_dim = part if latent else HEAD_DIM
    config.hidden_size = HEAD_DIM * config.num_attention_heads
    _shrink_rope(config, rotary // 2, HEAD_DIM // 2)


def _shrink_latent(config: PreTrainedConfig, whole_query: bool) -> None:
    """Shrink the sizes of latent attention.

    Args:
        whole_query: the config's heads are as wide as both parts of a query: the rotated part is a share of them.
    """
    share = config.qk_nope_head_dim // config.qk_rope_head_dim if whole_query else None
    for name, size in _MLA.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, size)
    if share:
        config.qk_nope_head_dim = share * config.qk_rope_head_dim
    if getattr(config, "qk_head_dim", None) is not None:
        config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim


def _heads(heads: int, key_heads: int, ranks: int) -> tuple[int, int]:
    """Numbers of key heads and of query heads per key head: small, and with the original's divisors among `ranks`'."""
    sizes = [n for n in range(1, ranks + 1) if ranks % n == 0]

    def same(small: int, large: int) -> bool:
        return all((small % n == 0) == (large % n == 0) for n in sizes)

    # At least two of each, where the original has them: with one, a mistake in their order would not show.
    options = [
        (k, g)
        for k in range(min(2, key_heads), key_heads + 1)
        for g in range(min(2, heads // key_heads), heads // key_heads + 1)
        if same(k, key_heads) and same(k * g, heads)
    ]
    return min(options, key=math.prod)


def _shrink_linear_heads(config: PreTrainedConfig, ranks: int) -> None:
    """Heads of linear attention, which are counted apart from those of attention."""
    keys, values = (getattr(config, f"linear_num_{kind}_heads", None) for kind in ("key", "value"))
    if isinstance(keys, int) and isinstance(values, int):
        config.linear_num_key_heads = alike(keys, 2, ranks)
        config.linear_num_value_heads = config.linear_num_key_heads * (values // keys)
        for name in ("linear_key_head_dim", "linear_value_head_dim"):
            if getattr(config, name, None) is not None:
                setattr(config, name, HEAD_DIM)


def _shrink_state_spaces(config: PreTrainedConfig) -> None:
    """Heads, groups and states of state space layers, whose names differ from family to family."""
    hidden = config.hidden_size
    # The layers' inner width is the hidden size times this factor; heads times their size must give it again.
    expand = _first(config, ("mamba_expand", "expand", "expand_factor"))
    inner = int(expand * hidden) if expand else 4 * HEAD_DIM
    for heads, head, groups in _STATE_SPACE_HEADS:
        if isinstance(getattr(config, heads, None), int) and isinstance(getattr(config, head, None), int):
            setattr(config, heads, 4)
            setattr(config, head, inner // 4)
            if isinstance(value := getattr(config, groups, None), int):
                setattr(config, groups, min(value, 2))
    if getattr(config, "mamba_d_ssm", None) is not None:
        config.mamba_d_ssm = inner
    if getattr(config, "num_attention_heads", None) is None and getattr(config, "intermediate_size", None):
        config.intermediate_size = inner
    for name in ("mamba_d_state", "ssm_state_size", "state_size", "mamba_chunk_size", "chunk_size"):
        if isinstance(value := getattr(config, name, None), int):
            setattr(config, name, min(value, HEAD_DIM))


def _first(config: PreTrainedConfig, names: Iterable[str]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _shrink_rope(config: PreTrainedConfig, old: int, new: int) -> None:
    """Shorten the lists of frequency factors, one for each rotary dimension, that some configs have.

    Other lists say how many of these dimensions turn with time, height and width (M-RoPE, arXiv 2409.12191).
    """
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(config, name, None)
        for parameters in [rope, *rope.values()] if isinstance(rope, dict) else []:
            if isinstance(parameters, dict):
                for key, value in parameters.items():
                    if isinstance(value, list) and len(value) == old:
                        parameters[key] = value[:new]
                    elif _are_shares(value, old) and new * sum(value) // old >= len(value):
                        parameters[key] = _shares(value, new * sum(value) // old)


def _are_shares(value: Any, whole: int) -> bool:
    """Whether these are numbers of dimensions, which add up to those that are turned: all, or a half or a quarter."""
    if not isinstance(value, list) or not all(isinstance(v, int) for v in value):
        return False
    return 4 * sum(value) in (whole, 2 * whole, 4 * whole)


def _shares(sizes: list[int], total: int) -> list[int]:
    """Whole numbers above zero in about the same proportions, that add up to `total`."""
    small = [max(1, size * total // sum(sizes)) for size in sizes]
    small[-1] += total - sum(small)
    return small


def _shrink_experts(config: PreTrainedConfig, ranks: int) -> None:
    chosen = 1
    for name in CHOICES:
        if value := getattr(config, name, None):
            chosen = min(value, 2)
            setattr(config, name, chosen)
    # Groups of experts are chosen first (arXiv 2412.19437): so few experts make one.
    for name in ("n_group", "topk_group"):
        if getattr(config, name, None):
            setattr(config, name, 1)
    counts = {name: n for name in COUNTS if isinstance(n := getattr(config, name, None), int) and n > 1}
    small = {name: alike(n, max(4, chosen), ranks) for name, n in counts.items()}
    for name, value in small.items():
        setattr(config, name, value)
    if counts and (empty := getattr(config, _EMPTY_EXPERTS, None)):  # as large a part of the choices as before
        setattr(config, _EMPTY_EXPERTS, max(1, empty * max(small.values()) // max(counts.values())))


def _silence_noise(config: PreTrainedConfig) -> None:
    """Turn off dropout and router noise: every process draws its own, so runs could not be compared."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and any(word in name for word in _NOISE):
            setattr(config, name, 0.0)
