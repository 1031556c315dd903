"""docs/components.md: every block runs, in order."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from automodel_trainer import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    KernelsConfig,
    LoRAConfig,
    add_lora,
    chunked_loss,
    clip_grad_norm_,
    pack,
)
from automodel_trainer.models.lora import apply_lora
from tests.limits import close
from tests.processes import call, run_code
from tests.tiny import tiny_model, tiny_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "components.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_page(tmp_path: Path) -> None:
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "my-model")
    tiny_tokenizer().save_pretrained(tmp_path / "my-model")
    turns = [{"role": "user", "content": "what is two plus two?"}, {"role": "assistant", "content": "it is four"}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(20)))
    assert len(BLOCKS) == 7
    call(tmp_path, run_code, "\n".join(BLOCKS), tmp_path / "page.py")
    assert (tmp_path / "my-adapter-alone" / "adapter_model.safetensors").is_file()
    assert list((tmp_path / "runs" / "lightning").rglob("manifest.json"))


def test_chunked_loss_is_the_models_own(tmp_path: Path) -> None:
    model = tiny_model("llama")
    ids = torch.arange(6, 54).view(4, 12)
    labels = ids.masked_fill(ids % 5 == 0, -100)
    reference = model(input_ids=ids, labels=labels).loss
    wanted = torch.autograd.grad(reference, list(model.parameters()))
    loss = chunked_loss(model, ids, labels)
    close(loss, reference, terms=ids.numel())
    for got, want in zip(torch.autograd.grad(loss, list(model.parameters())), wanted):
        close(got, want, terms=ids.numel())
    close(
        chunked_loss(model, ids, labels, num_items_in_batch=7) * 7,
        model(input_ids=ids, labels=labels, num_items_in_batch=7).loss * 7,
        terms=ids.numel(),
    )
    assert torch.is_tensor(model(input_ids=ids).logits)


def test_chunked_loss_has_all_parts_of_the_models_loss() -> None:
    """The loss of routers, targets that are shifted already, and models in a wrapper; other losses are refused."""
    ids = torch.arange(6, 54).view(4, 12)
    experts = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=1.0)
    own = experts(input_ids=ids, labels=ids).loss
    assert own - experts(input_ids=ids, labels=ids, output_router_logits=False).loss > 0.5
    close(chunked_loss(experts, ids, ids), own, terms=ids.numel())
    model = tiny_model("llama")
    shifted = ids.flip(0)
    close(
        chunked_loss(model, ids, ids, shift_labels=shifted),
        model(input_ids=ids, labels=ids, shift_labels=shifted).loss,
        terms=ids.numel(),
    )
    given: list[Any] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda *call: given.append(call[-1]))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    close(chunked_loss(wrapped, ids, ids), wrapped(input_ids=ids, labels=ids).loss, terms=ids.numel())
    assert not torch.is_tensor(given[0])  # not computed at once
    assert torch.is_tensor(given[-1])
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(ValueError, match="BertForMaskedLM has another loss"):
        chunked_loss(transformers.BertForMaskedLM(config), ids, ids)


def test_one_tensor_is_clipped() -> None:
    one, same = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    one.grad, same.grad = torch.full((3,), 5.0), torch.full((3,), 5.0)
    assert torch.equal(clip_grad_norm_(one, 1.0), torch.nn.utils.clip_grad_norm_(same, 1.0))
    assert torch.equal(one.grad, same.grad)


def test_parts_refuse_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sample 1 has 30 tokens, and a row has 8"):
        pack([5, 30], 8)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(tiny_model("llama").config)
    with pytest.raises(ValueError, match="on meta"):
        add_lora(empty, LoRAConfig(rank=2))


def test_a_loss_that_kernels_choose(tmp_path: Path) -> None:
    """`model(labels=…)` computes it, and a copy of the model computes with weights of its own."""
    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, kernels=KernelsConfig(loss="chunked"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(6, 54).view(4, 12)
    for more in ({}, {"num_items_in_batch": 7}):
        ours, theirs = (m(input_ids=ids, labels=ids, **more) for m in (model, plain))
        close(ours.loss, theirs.loss, terms=ids.numel())
    ours.loss.backward()
    theirs.loss.backward()
    close(model.lm_head.weight.grad, plain.lm_head.weight.grad, terms=ids.numel())
    assert not torch.is_tensor(ours.logits)
    close(ours.logits[:, 0], theirs.logits[:, 0])
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
        assert copied(input_ids=ids).logits.abs().max() == copied(input_ids=ids, labels=ids).logits[0].abs().max() == 0
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    with pytest.raises(ValueError, match="has another loss"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, kernels=KernelsConfig(loss="chunked"))
    assert torch.equal(apply_lora(plain, LoRAConfig(rank=2))(input_ids=ids).logits, model(input_ids=ids).logits)
