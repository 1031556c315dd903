"""Train adapters, merge them into their base, and answer a prompt: `python examples/lora.py org/name chats.jsonl`."""

import sys

import transformers

from automodel_trainer import CausalLMModule, ChatDataModule, LoRAConfig, Trainer


def main(model: str, data: str, steps: int = 100) -> None:
    module = CausalLMModule(model, lora=LoRAConfig(rank=16, dropout=0.05), lr=2e-4, scheduler="cosine")
    chats = ChatDataModule(data, seq_len=512, micro_batch_size=2, global_batch_size=8)
    trainer = Trainer(max_steps=steps, precision="bf16", default_root_dir="runs/lora")
    trainer.fit(module, chats)
    trainer.save_pretrained("adapter")  # PEFT's format
    trainer.merge_and_save("merged")  # a model of its own

    tokenizer = transformers.AutoTokenizer.from_pretrained("merged")
    tuned = transformers.AutoModelForCausalLM.from_pretrained("merged")
    chat = [{"role": "user", "content": "What is two plus two?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = tuned.generate(**asked, max_new_tokens=32)[0, asked["input_ids"].shape[1] :]
    print(tokenizer.decode(answer, skip_special_tokens=True))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
