"""The tokenizer in a GGUF file. llama.cpp splits text by rules that it knows by name, so only those can be written.

The names are those of gguf 0.19 and of its llama.cpp.
"""

from __future__ import annotations

import json
from typing import Any

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES = {
    "gpt-2": [("ByteLevel", True)],
    "smollm": [("Digits", True), ("ByteLevel", True)],
    "llama-bpe": [("Split", _WORDS.format(digits="{1,3}")), ("ByteLevel", False)],
    "qwen2": [("Split", _WORDS.format(digits="")), ("ByteLevel", False)],
}
"""llama.cpp's names of rules, and the pre-tokenizers of `tokenizers` that split so."""


def add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Write a byte-level BPE tokenizer, its special tokens and its chat template.

    Args:
        writer: a `gguf.GGUFWriter`.
        tokenizer: a fast tokenizer.
        size: rows of the model's embedding; ids beyond the vocabulary are marked as unused.

    Raises:
        ValueError: the tokenizer is of another kind.
    """
    import gguf

    if not tokenizer.is_fast:
        raise ValueError(f"--gguf needs a fast tokenizer, and {type(tokenizer).__name__} is slow.")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    rule = _rule(content)
    kinds = gguf.TokenType
    tokens = {i: (f"[PAD{i}]", kinds.UNUSED) for i in range(size)}
    tokens |= {i: (token, kinds.NORMAL) for token, i in content["model"]["vocab"].items()}
    for added in content["added_tokens"]:
        tokens[added["id"]] = (added["content"], kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list([tokens[i][0] for i in sorted(tokens)])
    writer.add_token_types([tokens[i][1] for i in sorted(tokens)])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    if merges:
        writer.add_token_merges(merges)
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _rule(content: dict[str, Any]) -> str:
    """llama.cpp's name of how the tokenizer splits text.

    Raises:
        ValueError: it has none.
    """
    given = content["pre_tokenizer"] or {}
    parts = given.get("pretokenizers", [given])
    found: list[tuple[str, Any]] = []
    for part in parts:
        kind = part.get("type")
        value = {
            "ByteLevel": part.get("use_regex", True),
            "Digits": part.get("individual_digits"),
            "Split": (part.get("pattern") or {}).get("Regex"),
        }.get(kind)
        plain = not part.get("add_prefix_space") and part.get("behavior", "Isolated") == "Isolated"
        found.append((str(kind), value if plain else None))
    name = next((name for name, rule in RULES.items() if rule == found), None)
    normalizer = (content["normalizer"] or {}).get("type")
    if name is None or content["model"]["type"] != "BPE" or normalizer not in (None, "NFC"):
        raise ValueError(
            f"--gguf writes byte-level BPE tokenizers that split text as {', '.join(RULES)} do, and this one is "
            f"{content['model']['type']} with {found}. Use llama.cpp's convert_hf_to_gguf.py on the exported folder."
        )
    return name
