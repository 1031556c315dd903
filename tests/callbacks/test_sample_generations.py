from __future__ import annotations

import copy
from contextlib import redirect_stdout
from io import StringIO
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from automodel_trainer.callbacks import SampleGenerations
from automodel_trainer.callbacks.sample_generations import side_by_side
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = ["hi", "how are you?"]


class Module(pl.LightningModule):
    """A user's own module: automatic optimization, dropout, and a part that stays in eval mode."""

    def __init__(self, tokenizer=True, lr=0.1):
        super().__init__()
        self.model = tiny_model(attention_dropout=0.5)
        self.tokenizer = tiny_tokenizer() if tokenizer else None
        self.frozen = torch.nn.Dropout().eval()
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Texts:
    """A logger that takes text, as TensorBoard's writer does."""

    def __init__(self):
        self.texts = []

    def add_text(self, tag, text, step):
        self.texts.append((tag, text, step))


def trainer_stub(step=0, rank=0, **attributes):
    defaults = {"global_step": step, "is_global_zero": rank == 0, "world_size": 1, "loggers": [], "datamodule": None}
    return SimpleNamespace(**{**defaults, **attributes})


def fit(callback, steps=4, **kwargs):
    rows = torch.randint(6, 260, (steps, 8), generator=torch.Generator().manual_seed(0))
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **kwargs,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, DataLoader(rows, batch_size=1))
    return module


def greedy(model, prompt, new_tokens):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(new_tokens):
            token = model(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
            if token == tokenizer.eos_token_id:
                break
    text = tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    return f"{text} …" if ids.shape[1] - start == new_tokens else text


def test_answers_before_and_after_are_those_of_the_weights_then(monkeypatch):
    callback = SampleGenerations(PROMPTS, max_new_tokens=5)
    answers = []
    original = SampleGenerations._answer_all
    monkeypatch.setattr(
        SampleGenerations, "_answer_all", lambda *args: answers.append(original(*args)) or answers[-1], raising=True
    )
    with redirect_stdout(StringIO()) as out:
        trained = fit(callback)
    assert answers[0] == [greedy(tiny_model(), prompt, 5) for prompt in PROMPTS]
    assert answers[1] == [greedy(trained.model.eval(), prompt, 5) for prompt in PROMPTS]
    text = out.getvalue()
    assert "before training" in text
    assert "after 4 steps" in text
    assert "how are you?" in text


def test_training_is_not_disturbed():
    """The same weights with and without: neither the random state (dropout draws from it) nor the modes move."""

    def weights(*callbacks):
        torch.manual_seed(0)
        with redirect_stdout(StringIO()):
            return fit(*callbacks).state_dict()

    expected = weights(pl.Callback())
    found = weights(SampleGenerations(PROMPTS, every_n_steps=1, max_new_tokens=3))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_modes_are_restored_as_they_were():
    module = Module().train()
    module.frozen.eval()
    modes = [part.training for part in module.modules()]
    assert set(modes) == {True, False}
    SampleGenerations(PROMPTS, max_new_tokens=2).on_train_start(trainer_stub(), module)
    assert [part.training for part in module.modules()] == modes


def test_every_n_steps_counts_optimizer_steps():
    with redirect_stdout(StringIO()) as out:
        fit(SampleGenerations(PROMPTS, every_n_steps=2, max_new_tokens=2), steps=8, accumulate_grad_batches=2)
    text = out.getvalue()
    assert text.count("step 2") == len(PROMPTS)
    assert text.count("step 4") == len(PROMPTS)
    assert "step 1 " not in text
    assert "step 3" not in text


def test_prompts_come_from_the_data_module(capsys):
    data = SimpleNamespace(sample_prompts=lambda n: [f"question {i}" for i in range(n)])
    callback, module = SampleGenerations(num_prompts=3, max_new_tokens=2), Module()
    callback.on_train_start(trainer_stub(datamodule=data), module)
    callback.on_train_end(trainer_stub(step=1, datamodule=data), module)
    text = capsys.readouterr().out
    assert all(f"question {i}" in text for i in range(3))


@pytest.mark.parametrize(
    ("module", "prompts", "named"),
    [
        (Module(), None, "sample_prompts"),
        (Module(tokenizer=False), PROMPTS, "tokenizer"),
        (SimpleNamespace(tokenizer=tiny_tokenizer(), model=torch.nn.Linear(1, 1)), PROMPTS, "generate"),
    ],
)
def test_where_it_cannot_ask_it_warns_once_and_is_off(module, prompts, named, capsys, recwarn):
    if isinstance(module, SimpleNamespace):
        module.modules, module.eval = (list), (lambda: None)
    callback = SampleGenerations(prompts, every_n_steps=1)
    callback.on_train_start(trainer_stub(), module)
    callback.on_train_batch_end(trainer_stub(step=1), module, None, None, 0)
    callback.on_train_end(trainer_stub(step=1), module)
    assert len([warning for warning in recwarn if named in str(warning.message)]) == 1
    assert capsys.readouterr().out == ""


def test_loggers_that_take_text_get_it_on_rank_0_only(capsys):
    texts = Texts()
    loggers = [SimpleNamespace(experiment=texts), SimpleNamespace(experiment=object())]
    for rank in (0, 1):
        callback, module = SampleGenerations(PROMPTS, max_new_tokens=2), Module()
        callback.on_train_start(trainer_stub(rank=rank, loggers=loggers), module)
        callback.on_train_end(trainer_stub(step=7, rank=rank, loggers=loggers), module)
    assert [(tag, step) for tag, _, step in texts.texts] == [
        ("samples/0", 0), ("samples/1", 0), ("samples/0", 7), ("samples/1", 7),
    ]  # fmt: skip
    assert "how are you?" in texts.texts[1][1]
    assert capsys.readouterr().out.count("sample answers") == 1


def test_a_module_with_a_generate_of_its_own_is_asked():
    class Own(Module):
        calls = 0

        def generate(self, input_ids, **kwargs):
            Own.calls += 1
            assert not self.model.training
            assert not torch.is_grad_enabled()
            return self.model.generate(input_ids, **kwargs)

    SampleGenerations(PROMPTS, max_new_tokens=2).on_train_start(trainer_stub(), Own())
    assert Own.calls == 2


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"max_new_tokens": 0}, {"prompts": "one string"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SampleGenerations(**arguments)


def test_answers_that_look_like_markup_are_shown_as_they_are(capsys):
    from rich.console import Console

    Console(width=80).print(side_by_side(["[bold]q"], {"before training": ["[red]a[/red]"], "after 3 steps": [""]}))
    text = capsys.readouterr().out
    assert "[red]a[/red]" in text
    assert "[bold]q" in text
    assert "(nothing)" in text


def sharded_answers():
    """On a rank: the answers of a model of which this rank holds a half, and whether it printed them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = Module()
    for layer in module.model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(module.model, mesh=init_device_mesh("cpu", (2,)))
    rank = torch.distributed.get_rank()
    callback, trainer = SampleGenerations(PROMPTS, max_new_tokens=5), trainer_stub(rank=rank, world_size=2)
    with redirect_stdout(StringIO()) as out:
        callback.on_train_start(trainer, module)
        before = copy.copy(callback._before)
        callback.on_train_end(trainer, module)
    return before, bool(out.getvalue())


def test_a_sharded_model_answers_on_every_rank_and_prints_on_one(pool):
    expected = [greedy(tiny_model(), prompt, 5) for prompt in PROMPTS]
    assert pool.run(2, sharded_answers) == [(expected, True), (expected, False)]
