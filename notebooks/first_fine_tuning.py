# %% [markdown]
# # First fine-tuning
#
# A small model of random weights begins to learn to add digits. Nothing is downloaded. It takes a minute on two cores.

# %%
import random

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from automodel_trainer import CausalLMModule, ChatDataModule, Trainer

# %% [markdown]
# ## A model and a tokenizer
#
# With a real model this cell is not needed: a folder or a Hub id takes the place of `"adder"` below.

# %%
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {token: number for number, token in enumerate(["<pad>", "<|im_start|>", "<|im_end|>", *alphabet])}
backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
)
tokenizer.chat_template = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
config = transformers.AutoConfig.for_model(
    "llama",
    vocab_size=len(tokenizer),
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
)
transformers.set_seed(0)
transformers.AutoModelForCausalLM.from_config(config).save_pretrained("adder")
paths = tokenizer.save_pretrained("adder")

# %% [markdown]
# ## Data
#
# Chats as they are. The format is recognized.

# %%
dice = random.Random(0)
sums = [(dice.randrange(10), dice.randrange(10)) for _ in range(1000)]
rows = [
    {"messages": [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": str(a + b)}]}
    for a, b in sums
]
data = ChatDataModule(rows, val_split=0.05, seq_len=256, micro_batch_size=4, global_batch_size=8)

# %% [markdown]
# ## Look at them
#
# What is green is trained, the rest is only read. Several documents share a row, and none sees another.

# %%
trainer = Trainer(max_steps=60, accelerator="cpu", devices=1, log_every_n_steps=2, default_root_dir="runs/notebook")
module = CausalLMModule("adder", lr=3e-3, scheduler="cosine")
trainer.preview(module, data)

# %% [markdown]
# ## Train
#
# The layout, the devices and the precision would be arguments of the Trainer. The ledger comes after the first step:
# what is trained, in which dtypes, on which devices. It stops a run on a surprise.

# %%
trainer.fit(module, data)

# %% [markdown]
# ## The Trainer, afterwards

# %%
trainer
