"""The needle test: find one sentence in a long text, before and after training on such rows.

`python examples/needle.py org/name 4096` prints how many numbers the model reads back, by the depth of their sentence.
The text is that of the passkey task of arXiv 2305.16300.
"""

import random
import sys

import datasets
import torch
import transformers

from automodel_trainer import CausalLMModule, ChatDataModule, LoRAConfig, Trainer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def row(tokenizer, length: int, depth: float, dice: random.Random) -> dict[str, str]:
    """A text of about `length` tokens with the number somewhere in it, and the question."""
    number = str(dice.randrange(10_000, 100_000))
    straws = max(1, (length - 128) // len(tokenizer(HAY)["input_ids"]))  # the question and the template have room
    before = round(depth * straws)
    text = HAY * before + f"The pass key is {number}. Remember it. " + HAY * (straws - before)
    return {"prompt": f"{text}\nWhat is the pass key? Answer with the number alone.", "completion": number}


@torch.no_grad()
def found(model, tokenizer, rows: list[dict[str, str]]) -> float:
    """The share of numbers that greedy answers contain."""
    right = 0
    for one in rows:
        chat = [{"role": "user", "content": one["prompt"]}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = model.generate(**asked.to(model.device), max_new_tokens=12, do_sample=False)
        right += one["completion"] in tokenizer.decode(answer[0, asked["input_ids"].shape[1] :])
    return right / len(rows)


def main(model: str, length: int = 4096, steps: int = 50, tries: int = 4) -> None:
    tokenizer, dice = transformers.AutoTokenizer.from_pretrained(model), random.Random(0)
    tests = {depth: [row(tokenizer, length, depth, dice) for _ in range(tries)] for depth in DEPTHS}
    rows = datasets.Dataset.from_list([row(tokenizer, length, dice.random(), dice) for _ in range(8 * steps)])
    data = ChatDataModule(rows, seq_len=length, micro_batch_size=1, global_batch_size=8)
    strategy = "fsdp2:activation_checkpointing=offload,tiled_mlp=auto"  # memory that hardly grows with the row
    trainer = Trainer(strategy=strategy, precision="bf16", max_steps=steps, default_root_dir="runs/needle")
    trainer.fit(CausalLMModule(model, lora=LoRAConfig(rank=16), lr=3e-4), data)
    trainer.merge_and_save("runs/needle/merged")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, folder in (("before", model), ("after", "runs/needle/merged")):
        scored = transformers.AutoModelForCausalLM.from_pretrained(folder).to(device)
        shares = {depth: found(scored, tokenizer, rows) for depth, rows in tests.items()}
        print(name, "  ".join(f"{depth:.0%} deep: {share:.0%}" for depth, share in shares.items()))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
