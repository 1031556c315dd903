"""Chat templates for tokenizers that have none, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
        "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] + "
        "(eos_token if message['role'] == 'assistant' else '') + '\\n\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
    ),
}
"""`chatml` needs `<|im_start|>` and `<|im_end|>` in the vocabulary; `plain` needs an EOS token."""
NEEDS = {"chatml": ("<|im_start|>", "<|im_end|>")}


def set_template(tokenizer: Any, chosen: str) -> None:
    """Give a tokenizer a chat template: a built-in one by name, a Jinja file, or the template itself.

    Raises:
        ValueError: no such template, or the tokenizer lacks a token that it writes.
    """
    if chosen in TEMPLATES:
        vocabulary = tokenizer.get_vocab()
        lacking = [token for token in NEEDS.get(chosen, ()) if token not in vocabulary]
        if lacking or (chosen == "plain" and tokenizer.eos_token is None):
            what = ", ".join(lacking) or "eos_token"
            raise ValueError(
                f"chat_template={chosen!r} writes {what}, which this tokenizer does not have. Choose another of "
                f"{', '.join(TEMPLATES)}, or add the token to tokenizer and model."
            )
        tokenizer.chat_template = TEMPLATES[chosen]
    elif "{{" in chosen or "{%" in chosen:
        tokenizer.chat_template = chosen
    elif Path(chosen).expanduser().is_file():
        tokenizer.chat_template = Path(chosen).expanduser().read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"chat_template={chosen!r} is no file and no template. Allowed: {', '.join(TEMPLATES)}, a Jinja file, or "
            "the text of a template."
        )
