"""What configs and processors of tests/vlm/families.py and tests/vlm/more_families.py have in common."""

from __future__ import annotations

from typing import Any, ClassVar
from unittest import mock

import transformers
from tokenizers import Tokenizer, decoders, models

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 2048, "bos_token_id": 257,
    "eos_token_id": 260, "pad_token_id": 256,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def byte_tokenizer(special: dict[str, int], named: dict[str, str]) -> Any:
    """Bytes and special tokens.

    Args:
        special: their ids.
        named: those that processors ask for, by their names.
    """
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | special
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    inner.decoder = decoders.ByteFallback()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        model_max_length=2048,
        extra_special_tokens=named,
    )


class NoVideos:
    """Stands where a processor has a part for videos, which is never called: real ones need torchvision."""

    model_input_names: ClassVar[list[str]] = []
    merge_size = 2
    num_frames = fps = 1


def without_videos(kind: Any, **parts: Any) -> Any:
    """A processor of this class that does not ask for the class of its part for videos, empty unless it is given."""
    own = globals().get(kind.__name__)
    if own is None:
        own = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None, "__module__": __name__})
        globals()[kind.__name__] = own  # so that it can be pickled
    with mock.patch("transformers.models.smolvlm.processing_smolvlm.num2words"):  # it spells the length of a video
        return own(**{"video_processor": NoVideos(), **parts})
