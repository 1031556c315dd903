# %% [markdown]
# # A model that sees pictures
#
# A small model with random weights, a tower for pictures and a decoder, learns to answer questions about shapes and
# colours. The data are those of the Python package `easy-vqa`. Three minutes on a CPU are enough to see it begin;
# `make vlm` trains to the end.

# %%
from pathlib import Path

from automodel_trainer import ImageTextDataModule, ImageTextModule, Trainer
from automodel_trainer.tools.vlm_answers import answers, read
from automodel_trainer.tools.vlm_quickstart import prepare

model, folder = prepare("runs/vlm_quickstart")
data = ImageTextDataModule(
    folder / "train.jsonl",
    validation=folder / "validation.jsonl",
    seq_len=128,
    micro_batch_size=16,
    global_batch_size=16,
)
module = ImageTextModule(model, freeze=[], lr=1e-3, scheduler="cosine")  # the tower is random, so it is trained, too

# %% [markdown]
# ## What the model gets
#
# Every document begins with the tokens of its picture. Only the answer is trained.

# %%
trainer = Trainer(
    max_steps=150,
    accelerator="cpu",
    devices=1,
    log_every_n_steps=5,
    val_check_interval=50,
    check_val_every_n_epoch=None,
    limit_val_batches=4,
    default_root_dir="runs/pictures",
)
trainer.preview(module, data)

# %% [markdown]
# ## Train

# %%
trainer.fit(module, data)
trainer.save_pretrained("runs/pictures/hf")

# %% [markdown]
# ## Ask about new pictures
#
# transformers loads the folder and answers. The commonest answer to each question is right in 67 % of them, so what
# lies beyond that has been seen. After 150 steps that is little; `make vlm` trains for longer and counts.

# %%
questions = read(folder / "validation.jsonl")[:600]
given = answers(Path("runs/pictures/hf"), questions)
right = sum(answer == question.answer for answer, question in zip(given, questions))
print(f"{right} of {len(questions)} right")
for question, answer in list(zip(questions, given))[:8]:
    print(f"{question.text}  {answer}  ({'right' if answer == question.answer else question.answer})")
