"""FLOPs of vision towers against torch's own count of the operators that run in them."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from automodel_trainer import ImageTextDataModule, ImageTextModule, KernelsConfig, Trainer
from automodel_trainer.callbacks import Throughput
from automodel_trainer.callbacks.counts import Totals
from automodel_trainer.nn.flops import flops_per_token
from automodel_trainer.nn.tower_flops import TowerWork
from automodel_trainer.nn.towers import tower_of
from tests.test_trainer import quiet
from tests.vlm.families import ALL, MARKS, folder_of, model_of, picture, processor_of, rows

EAGER = KernelsConfig(attention="eager")  # torch does not count fused attention of a CPU


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("family", ALL)
def test_a_tower_costs_what_torch_counts(family: str, frozen: bool) -> None:
    model = model_of(family)
    model.set_attn_implementation(EAGER.attention)
    tower = tower_of(model)
    assert tower is not None
    tower.requires_grad_(not frozen)
    mark = MARKS.get(family, "<image>")
    pictures = [picture(60, 90), picture(84, 56, seed=1)]
    inputs = processor_of(family)(images=pictures, text=f"{mark}{mark} what?", return_tensors="pt")
    given: list[Any] = []
    hook = tower.register_forward_pre_hook(lambda _, *call: given.extend(call), with_kwargs=True)
    model(**inputs)
    hook.remove()
    work = TowerWork([tower])
    work.attach()
    with FlopCounterMode(display=False) as counter:
        output = tower(*given[0], **{**given[1], "output_hidden_states": False})
        if not frozen:
            sum(t.sum() for t in tree_leaves(dict(output)) if torch.is_tensor(t)).backward()
    work.detach()
    counted = counter.get_total_flops()
    assert work.take().item() == pytest.approx(counted, rel=0.03)
    assert not work.take()


def test_a_model_that_its_tower_holds_is_freed() -> None:
    """As hooks of FSDP do."""
    model = model_of("llava")
    tower = tower_of(model)
    assert tower is not None
    tower.register_forward_hook(lambda *_, model=model: None)
    gone = ref(model)
    del model, tower
    gc.collect()
    assert gone() is None


def test_weights_of_a_tower_do_not_count_for_tokens() -> None:
    model = model_of("llava")
    before = flops_per_token(model, 8)
    tower = tower_of(model)
    assert tower is not None
    tower.requires_grad_(False)
    assert flops_per_token(model, 8) == before
    language = sum(p.numel() for p in model.model.language_model.layers.parameters() if p.ndim > 1)  # type: ignore[union-attr, operator]
    assert before > 6 * language


def test_the_throughput_counts_the_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training alone: a validation after each step is not part of it."""
    (tmp_path / "pictures.jsonl").write_text("\n".join(map(json.dumps, rows(tmp_path))))
    seen: list[Totals] = []
    efficiency = Throughput._efficiency
    monkeypatch.setattr(Throughput, "_efficiency", lambda *args: seen.append(args[2]) or efficiency(*args))
    throughput, module = Throughput(), ImageTextModule(str(folder_of("llava", tmp_path)), kernels=EAGER)
    counted: list[int] = []

    class Watch(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            counted.append(0)
            counter = FlopCounterMode(display=False)  # counts anew in every context

            def end(*_: Any) -> None:
                counter.__exit__(None, None, None)
                counted[-1] += counter.get_total_flops()

            tower = module.model.get_encoder(modality="image")
            start = tower.register_forward_pre_hook(lambda *_: counter.__enter__() and None)
            self.hooks = start, tower.register_forward_hook(end)

        def on_train_batch_end(self, *_: Any) -> None:
            for hook in self.hooks:
                hook.remove()

    trainer = Trainer(**quiet(tmp_path, max_steps=3, callbacks=[throughput, Watch()]))
    options: dict[str, Any] = {"seq_len": 256, "global_batch_size": 2}
    trainer.fit(module, ImageTextDataModule(str(tmp_path / "pictures.jsonl"), **options))
    assert seen[-1].tower_kflops == pytest.approx(counted[-1] / 1e3, rel=0.05)
    last, work = throughput.last, seen[-1]
    per_token = flops_per_token(module.model, work.mean_document()) + work.tower_kflops * 1e3 / work.tokens
    assert last["tflops_per_device"] * 1e12 / last["tokens_per_second_per_device"] == pytest.approx(per_token)
