"""What a run needs on each GPU, by arithmetic. `tests/site/test_choose.py` compares it with what was measured."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
NF4 = 0.5 + 0.5 / 64 * 2  # bytes of a weight in 4 bits with its scales
HELD = 0.1  # as `sync_every_micro_batch="auto"` has it (strategies/data_parallel/shard.py)
LOGITS = 2**29  # that exist at a time, in bf16 (modules/linear_cross_entropy.py)
BACKWARD = 2.3  # what a recomputed block holds in its backward, over what it would have kept: gradients lie beside it


@dataclass(frozen=True)
class Shape:
    """A decoder.

    Attributes:
        hidden, layers, vocabulary: as in its config.
        queries, keys: width of all query heads, and of all key heads.
        feed_forward: width of the gated MLP, or of one expert.
        experts, chosen: of a layer, and how many a token takes; 1 and 1 is a plain MLP.
        tied: whether head and embedding are one weight.
        normed: width of what norms inside a block (of heads, of results) keep beside that, when all is trained.
    """

    hidden: int
    layers: int
    queries: int
    keys: int
    feed_forward: int
    vocabulary: int
    experts: int = 1
    chosen: int = 1
    tied: bool = False
    normed: int = 0

    @property
    def block(self) -> int:
        """Parameters of a block, without norms."""
        attention = self.hidden * (2 * self.queries + 2 * self.keys)
        router = self.hidden * self.experts if self.experts > 1 else 0
        return attention + router + 3 * self.hidden * self.feed_forward * self.experts

    @property
    def ends(self) -> int:
        """Parameters of embedding and head."""
        return self.hidden * self.vocabulary * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All of them, without norms."""
        return self.layers * self.block + self.ends

    def adapters(self, rank: int = 16) -> int:
        """Parameters of adapters on every linear layer of the blocks."""
        hidden, queries, keys = self.hidden, self.queries, self.keys
        attention = (hidden + queries) * 2 + (hidden + keys) * 2
        return rank * self.layers * (attention + self.experts * 3 * (hidden + self.feed_forward))

    def kept(self, adapters: bool) -> int:
        """Bytes of activations in bf16 that a compiled block keeps for each token until its backward.

        Args:
            adapters: weights are frozen under adapters, whose input is kept too.
        """
        wide = 3 if adapters else 2  # gate and up; the input of down
        mlp = self.chosen * wide * self.feed_forward
        if self.experts > 1:
            mlp = self.chosen * (3 * self.feed_forward + self.hidden)  # and the tokens, sorted
        return 2 * (3 * self.hidden + self.queries + 2 * self.keys + mlp + (0 if adapters else self.normed))


def needed(
    shape: Shape, goal: str, gpus: int, tokens: int, *, recompute: bool, accumulate: bool = True, memory: float = 0
) -> dict[str, float]:
    """GiB on each GPU, by what they are for.

    Args:
        shape: of the model.
        goal: `full` (fp32 weights and Adam, bf16 compute), `lora` (frozen bf16), or `qlora` (frozen NF4).
        gpus: that share everything (FSDP2).
        tokens: of a micro-batch on one GPU.
        recompute: activation checkpointing of whole blocks.
        accumulate: several micro-batches a step, so gradients lie beside activations.
        memory: GiB of a GPU. Up to `HELD` of it, whole gradients wait for the last micro-batch of a step.
    """
    adapters = goal != "full"
    activations = shape.layers * tokens * shape.kept(adapters)
    if recompute:
        activations = tokens * (shape.layers * 2 * shape.hidden + BACKWARD * shape.kept(adapters))
    gathered = 2 * 2 * shape.block if gpus > 1 else 0
    head = shape.hidden * shape.vocabulary
    if not adapters:
        states, gradients = 12 * shape.parameters / gpus, 4 * shape.parameters / gpus
        other = gathered + 8 * head  # embedding and head in bf16, the head's gradient in fp32
        if gpus > 1 and accumulate:
            other += 4 * head  # it is reduced beside what earlier micro-batches have left
    else:
        inside = NF4 if goal == "qlora" else 2
        states = (inside * shape.layers * shape.block + 2 * shape.ends) / gpus
        gradients = 16 * shape.adapters() / gpus  # in fp32, with Adam's moments and their own weights
        other = gathered + 2 * head * (gpus > 1) + 2 * min(LOGITS, tokens * shape.vocabulary)
        other += 2 * 2 * shape.block if goal == "qlora" and shape.experts == 1 else 0  # experts multiply as they are
    waiting = 4 * (shape.adapters() if adapters else shape.parameters)
    if gpus > 1 and accumulate and waiting <= HELD * memory * GIB:
        gradients += waiting
    if not accumulate:
        gradients = max(0.0, gradients - activations)
    parts = {"states": states, "gradients": gradients, "activations": activations, "other": other + 0.5 * GIB}
    return {name: size / GIB for name, size in parts.items()}
