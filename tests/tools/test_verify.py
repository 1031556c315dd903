"""`amt verify` passes what is right, and catches defects planted in the ranks of the layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from automodel_trainer import CausalLMModule, Trainer, cli
from automodel_trainer.models.shrink import alike, shrink
from automodel_trainer.strategies import DDPStrategy, FSDP2Strategy, MeshStrategy, inner_parallel
from automodel_trainer.strategies.context.split import ContextParallel
from automodel_trainer.strategies.tensor import local_parameters
from automodel_trainer.verification.batches import renumber
from automodel_trainer.verification.errors import weight_errors
from automodel_trainer.verification.report import Report
from automodel_trainer.verification.steps import layout_run
from automodel_trainer.verification.verify import verify
from tests.harness import Batch
from tests.matrix import more
from tests.pool import RankPool
from tests.strategies.test_context import rows_of
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer


def module_of(family: str = "llama", **overrides: Any) -> CausalLMModule:
    model = tiny_model(family, **{"num_hidden_layers": 3, **overrides})
    return CausalLMModule(model, tokenizer=tiny_tokenizer())


def batches(form: str = "packed") -> list[list[Batch]]:
    """Micro-batches of one row, with very different numbers of labels."""
    found = [[row] for seed in range(6) for row in rows_of(form, seed)]
    for index, (row,) in enumerate(found):
        row["labels"][:, 5 + 3 * (index % 5) :] = -100
    return found


class Planted:
    """A launcher that plants a defect in the ranks of the layout, and leaves the reference alone."""

    def __init__(self, pool: RankPool, defect: Callable[[pytest.MonkeyPatch], None] | None = None) -> None:
        self.pool, self.defect = pool, defect

    def __call__(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        if self.defect is not None and function is layout_run:
            return self.pool.run(world_size, with_defect, self.defect, function, *args)
        return self.pool.run(world_size, function, *args)


def with_defect(defect: Callable[[pytest.MonkeyPatch], None], function: Callable[..., Any], *args: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        defect(patch)
        return function(*args)


@pytest.mark.parametrize(
    ("strategy", "family", "overrides", "form"),
    [
        ("fsdp2:cp=2", "llama", {"tie_word_embeddings": True}, "packed"),
        ("fsdp2:cp=2,cp_attention=ring", "qwen3", {}, "padded, ragged"),
        ("ddp", "llama", {}, "plain"),
        ("fsdp2:tp=2", "qwen3", {"tie_word_embeddings": True}, "packed"),
        more("fsdp2:tp=2,cp=2", "gemma3_text", {"sliding_window": 300}, "packed"),
        ("3d:pp=2,tp=2,schedule=zbv", "gemma3_text", {"num_hidden_layers": 4}, "packed"),
    ],
)
def test_layouts_that_are_right(
    pool: RankPool, strategy: str, family: str, overrides: dict[str, Any], form: str
) -> None:
    report = verify(module_of(family, **overrides), batches(form), strategy, launch=Planted(pool))
    assert report.passed, [q for q in report.quantities if not q.passed]
    assert report.module is None
    assert report.findings == []
    assert report.modules_compared > 10
    assert max(q.error for q in report.quantities) > 0  # something was compared


# --- defects ----------------------------------------------------------------------------------------------------------


def not_reduced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DDPStrategy, "layout", lambda self, module: self.model_to_device())


def averaged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FSDP2Strategy, "gradient_scale", 1.0)


def normalised_per_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MeshStrategy, "sum_over_rows", lambda self, tokens: tokens * self.dp_size)


def untied_head(patch: pytest.MonkeyPatch) -> None:
    original = FSDP2Strategy.parallelize

    def untie(self: FSDP2Strategy, model: Any) -> Any:
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        return original(self, model)

    patch.setattr(FSDP2Strategy, "parallelize", untie)
    patch.setattr(PreTrainedModel, "tie_weights", lambda self, *args, **kwargs: None)


def norm_not_synchronised(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(local_parameters, "sum_gradient", lambda local, group, **kwargs: local)
    # The strategy's own look at replicated gradients sees this one too, before there is anything to compare.
    patch.setattr(inner_parallel, "check_replicas", lambda model, mesh: None)


def norm_not_synchronised_with_the_look(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(local_parameters, "sum_gradient", lambda local, group, **kwargs: local)


def _after_split(patch: pytest.MonkeyPatch, change: Callable[[dict[str, Any], Any], Any]) -> None:
    original = ContextParallel.split

    def split(self: ContextParallel, inputs: dict[str, Any], targets: Any) -> Any:
        manager = original(self, inputs, targets)
        enter = manager.__enter__

        class Changed:
            def __enter__(self) -> Any:
                return change(*enter())

            def __exit__(self, *error: Any) -> None:
                manager.__exit__(*error)

        return Changed()

    patch.setattr(ContextParallel, "split", split)


def positions_restart(patch: pytest.MonkeyPatch) -> None:
    def restart(inputs: dict[str, Any], targets: Any) -> Any:
        positions = inputs["position_ids"]
        return {**inputs, "position_ids": torch.arange(positions.shape[1]).expand_as(positions)}, targets

    _after_split(patch, restart)


def label_dropped(patch: pytest.MonkeyPatch) -> None:
    """What shifting labels after the split does: the last of a chunk has nothing to predict."""

    def drop(inputs: dict[str, Any], targets: Any) -> Any:
        targets = targets.clone()
        targets[:, targets.shape[1] // 2 - 1] = -100
        return inputs, targets

    _after_split(patch, drop)


def documents_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = ContextParallel._sequences

    def forget(self: ContextParallel, *args: Any) -> Any:
        sequences = original(self, *args)
        sequences.documents = None
        return sequences

    patch.setattr(ContextParallel, "_sequences", forget)


def test_the_strategy_itself_refuses_an_unsynchronised_norm(pool: RankPool) -> None:
    launch = Planted(pool, norm_not_synchronised_with_the_look)
    with pytest.raises(AssertionError, match=r"different gradients of model.layers.\*.input_layernorm"):
        verify(module_of(), batches(), "fsdp2:tp=2", launch=launch)


@pytest.mark.parametrize(
    ("defect", "strategy", "tied", "module", "words"),
    [
        (not_reduced, "ddp", False, None, "gradients of step 1 differ"),
        (averaged, "fsdp2:dp_shard=2", False, None, "All gradients are 0.5 times"),
        (normalised_per_rank, "fsdp2:dp_shard=2", False, None, "number of tokens"),
        (untied_head, "fsdp2:dp_shard=2", True, "lm_head", "lm_head"),
        (norm_not_synchronised, "fsdp2:tp=2", False, None, "norm"),
        (positions_restart, "fsdp2:cp=2", False, "model.rotary_emb", "model.rotary_emb"),
        (label_dropped, "fsdp2:cp=2", False, None, "a label lost"),
        (documents_forgotten, "fsdp2:cp=2", False, "model.layers.0.self_attn.o_proj", "o_proj"),
    ],
)
def test_planted_defects(
    pool: RankPool, defect: Any, strategy: str, tied: bool, module: str | None, words: str
) -> None:
    report = verify(module_of(tie_word_embeddings=tied), batches(), strategy, launch=Planted(pool, defect))
    assert not report.passed
    assert (report.module and report.module[0]) == module, report.findings
    assert words in " ".join(report.findings), report.findings
    report.print()
    assert json.loads(json.dumps(report.to_dict()))["passed"] is False


# --- the pieces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "overrides", "layers"),
    [
        ("gemma3_text", {"num_hidden_layers": 12, "sliding_window": 512}, 2),
        ("qwen3", {"num_hidden_layers": 9}, 2),
        ("deepseek_v3", {"num_hidden_layers": 9, "first_k_dense_replace": 3, "n_routed_experts": 64}, 2),
        ("qwen3_moe", {"num_hidden_layers": 9, "num_experts": 128, "mlp_only_layers": [4]}, 2),
        ("phi3", {"num_hidden_layers": 8, "attention_dropout": 0.1, "resid_pdrop": 0.2}, 2),
    ],
)
def test_shrink(family: str, overrides: dict[str, Any], layers: int) -> None:
    sizes = {"hidden_size": 768, "num_attention_heads": 24, "num_key_value_heads": 24, "vocab_size": 50257}
    sizes |= {"head_dim": 32, "intermediate_size": 4096}
    small = shrink(tiny_config(family, **{**sizes, **overrides}), ranks=8, length=64, vocab_size=100)
    assert small.num_hidden_layers == layers
    assert small.num_attention_heads == 8  # like 24, it divides by 8 but not by 16
    assert small.vocab_size == 105  # like 50257, it is one more than a multiple of 8
    model = tiny_model_of(small)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert not [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p]
    kinds = getattr(small, "layer_types", None)
    assert kinds is None or len(set(kinds)) == (2 if family == "gemma3_text" else 1)


def tiny_model_of(config: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model(input_ids=torch.arange(12)[None])
    return model


def test_shrink_takes_configs_that_count_layers_apart() -> None:
    """This one refuses to have its number of layers set."""
    config = AutoConfig.for_model("prophetnet", num_encoder_layers=6, num_decoder_layers=6)
    assert isinstance(shrink(config, ranks=4, length=64, vocab_size=100), type(config))


def test_shrink_keeps_experts_beside_choices_of_none() -> None:
    config = AutoConfig.for_model("longcat_flash", n_routed_experts=512, zero_expert_num=256)
    small = shrink(config, ranks=4, length=64, vocab_size=100)
    assert (small.n_routed_experts, small.zero_expert_num, small.moe_topk) == (4, 2, 2)
    many = shrink(AutoConfig.for_model("aria_text", moe_num_experts=64, moe_topk=6), 4, length=64, vocab_size=100)
    assert (many.moe_num_experts, many.moe_topk) == (4, 2)


def test_shrink_keeps_heads_as_wide_as_both_parts_of_a_query() -> None:
    config = AutoConfig.for_model("dots3_note_text")
    small = shrink(config, ranks=4, length=64, vocab_size=100)
    assert small.head_dim == small.qk_nope_head_dim + small.qk_rope_head_dim


@pytest.mark.parametrize(
    ("family", "name", "factor"), [("xlstm", "embedding_dim", 1), ("zamba2", "attention_hidden_size", 2)]
)
def test_shrink_keeps_multiples_of_the_hidden_size(family: str, name: str, factor: int) -> None:
    small = shrink(AutoConfig.for_model(family), ranks=4, length=64, vocab_size=100)
    assert getattr(small, name) == factor * small.hidden_size <= 512


def test_a_padding_id_that_no_row_uses_stays_one() -> None:
    config = tiny_config(pad_token_id=200, bos_token_id=None, eos_token_id=7)
    ids = torch.tensor([[7, 9, 9, 3]])
    steps = [[{"input_ids": ids, "labels": ids.clone()}]]
    assert renumber(module_of(), steps, config) == 4
    assert steps[0][0]["input_ids"].tolist() == [[1, 2, 2, 0]]
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (3, None, 1)


def test_weights_that_only_rounding_moves() -> None:
    """A key's bias starts at zero and has no gradient: what is compared is a full step, not rounding."""
    weight, rounded = torch.full((4,), 3e-9), torch.full((4,), 4e-9)
    assert weight_errors({"bias": rounded}, {"bias": weight}, lr=3e-3)["bias"] < 1e-6
    assert weight_errors({"bias": weight + 3e-5}, {"bias": weight}, lr=3e-3)["bias"] == pytest.approx(1e-2, rel=1e-3)
    assert weight_errors({"large": weight + 1.01}, {"large": weight + 1}, lr=3e-3)["large"] == pytest.approx(1e-2, 1e-3)


def test_alike() -> None:
    assert alike(50257, 100, 8) == 105
    assert alike(7, 100, 8) == 7


def test_refusals_reach_the_user(pool: RankPool) -> None:
    with pytest.raises(ValueError, match="GPUs, and this machine has"):
        verify(module_of(), batches(), "fsdp2:dp_shard=64", full=True)
    with pytest.raises(ValueError, match="no batch of the data has a supervised token"):
        verify(module_of(), [], "fsdp2", launch=Planted(pool))


def test_trainer_verify(pool: RankPool, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(strategy=FSDP2Strategy(cp=2), accelerator="cpu", devices=1, logger=False)
    report = trainer.verify(module_of(), batches(), launch=Planted(pool))
    assert isinstance(report, Report)
    assert report.passed
    assert "same numbers as one device" in capsys.readouterr().out


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from automodel_trainer.verification import ranks as verify_ranks

    monkeypatch.setattr(verify_ranks.Processes, "__call__", in_this_process)
    folder = tmp_path / "model"
    tiny_model(num_hidden_layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    chats = [
        {"messages": [{"role": r, "content": t} for r, t in (("user", "Hi"), ("assistant", f"Hello {i}"))]}
        for i in range(12)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(chat) for chat in chats))
    config = {
        "trainer": {"strategy": "fsdp2", "max_steps": 3, "callbacks": [{"class_path": "HFExport"}], "devices": 8},
        "model": {"model": str(folder)},
        "data": {"train": str(tmp_path / "chats.jsonl"), "seq_len": 128},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    arguments = ["verify", "--config", str(tmp_path / "run.yaml"), "--devices", "1", "--json"]
    with pytest.raises(SystemExit) as done:
        cli.main(arguments)
    out = capsys.readouterr().out
    assert done.value.code == 0, out
    report = json.loads(out[out.index("{") :])
    assert report["passed"] is True
    assert "2 layers" in report["model"]


def in_this_process(self: Any, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    assert world_size == 1
    from tests.pool import _free_port

    with pytest.MonkeyPatch.context() as patch:
        names = {"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
        for name, value in {**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}.items():
            patch.setenv(name, str(value))
        return [function(*args)]
