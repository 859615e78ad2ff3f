"""The section of the configuration that says how the policy is trained.

Nothing here imports torch, ray or vllm.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mipo_ray.config.base import Section, check_at_most, execution_only, node_labels, reserved_cpus, reserved_gpus
from mipo_ray.config.field_types import (
    LabelSelector,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ReservedCpus,
    ReservedGpus,
    Share,
)

Layout = Literal["padded", "packed", "shared"]
Attention = Literal["sdpa", "flex_attention"]
Objective = Literal["dpo", "ipo", "infonce", "sami", "sft"]
PlacementStrategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]

# How often a round is saved where `checkpoint_steps` does not say it.
CHECKPOINT_MINUTES = 30

# Objectives that look at log policy / reference; the others need no reference.
WITH_REFERENCE = ("dpo", "ipo", "infonce")


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), by peft. Merged into the weights when a round ends."""

    rank: NonNegativeInt = Field(0, description="rank of the adapters; 0: full fine-tuning")
    alpha: PositiveFloat = Field(32.0, description="adapters are scaled by alpha / rank")
    target_modules: tuple[str, ...] = Field(
        ("all-linear",),
        strict=False,
        description="names of the layers that get adapters; all-linear: every linear layer but the output head",
    )


class TrainConfig(Section):
    """Preference optimisation on the round's pairs."""

    objective: Objective = Field(
        "dpo",
        description="dpo (Rafailov et al. 2023); ipo (Azar et al. 2023); infonce: one chosen against all K rejected; "
        "sami (Fraenken et al. 2024); sft: negative log-likelihood of the chosen response",
    )
    beta: PositiveFloat = Field(0.1, description="dpo, ipo (its tau), infonce: strength of the tie to the reference")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="dpo: assumed share of pairs with swapped labels (conservative DPO)"
    )
    length_normalized: bool = Field(
        False, description="dpo, ipo, infonce: divide each response's log-prob ratio by its tokens"
    )
    nll_coefficient: NonNegativeFloat = Field(
        0.0, description="dpo, ipo, infonce: weight of the chosen response's negative log-likelihood per token"
    )
    reference: Literal["round_start", "initial"] = Field(
        "round_start", description="the frozen reference: the round's starting policy, or the initial model always"
    )
    reference_mode: Literal["colocated", "cached", "adapter"] = execution_only(
        "colocated",
        "colocated: a frozen copy beside the policy; cached: its log-probs are computed once, before the "
        "first update, and stored; adapter: the policy with its LoRA adapters off",
    )
    offload_reference: bool = execution_only(
        False, "colocated: the reference stays in CPU memory, sharded over the workers, and comes layer by layer"
    )
    shuffle_labels: bool = Field(
        False,
        description="a control that must not win: dpo and ipo on pairs of which a seeded half has chosen and rejected "
        "swapped, so that nothing is preferred on average",
    )
    lora: LoraConfig = Field(default_factory=LoraConfig, description="train adapters instead of all weights")
    learning_rate: PositiveFloat = Field(5e-7, description="peak learning rate of AdamW")
    batch_size: PositiveInt = Field(4, description="pairs per optimizer step over all workers")
    epochs: PositiveInt = Field(1, description="passes over the round's pairs")
    warmup_ratio: Share = Field(0.03, description="share of the steps with a linearly rising learning rate")
    min_learning_rate_ratio: Share = Field(0.1, description="floor of the cosine schedule, as a share of the peak")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradient clipping, L2 norm over all parameters")
    adam_betas: tuple[Share, Share] = Field((0.9, 0.95), description="AdamW betas", strict=False)
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW weight decay")
    layout: Layout = execution_only(
        "shared",
        "how pairs become tensors; the loss is the same. padded: a row for each response; packed: all "
        "sequences in one row, without padding; shared: packed, with each prompt only once",
    )
    attention: Attention = execution_only(
        "sdpa",
        "sdpa: torch's own kernels; flex_attention: one compiled kernel (GPUs only)",
    )
    micro_batch_tokens: PositiveInt = execution_only(
        4096, "tokens of one forward pass of one worker, padding included; a larger pair goes alone"
    )
    gradient_checkpointing: bool = execution_only(False, "recompute activations in backward")
    torch_compile: bool = execution_only(
        False, "compile the model's layers, which takes some 20 seconds in every round; for GPUs"
    )
    num_workers: PositiveInt = execution_only(1, "data-parallel training workers (at most, with min_workers)")
    min_workers: PositiveInt | None = execution_only(
        None, "start, and go on after a loss, with as few workers as this; null: always num_workers"
    )
    gpus_per_worker: ReservedGpus | None = reserved_gpus("a worker", "1")
    cpus_per_worker: ReservedCpus = reserved_cpus("a worker")
    label_selector: LabelSelector = node_labels("training workers", role="train")
    placement_strategy: PlacementStrategy = execution_only(
        "PACK",
        "how workers are spread over nodes. PACK: on as few as possible; SPREAD: on as many as possible; "
        "STRICT_PACK: on one; STRICT_SPREAD: each on another",
    )
    zero_stage: Literal[0, 1, 2, 3] = execution_only(
        2, "DeepSpeed ZeRO stage; the same until a round that has checkpoints is done"
    )
    offload_optimizer: bool = execution_only(False, "keep optimizer states in CPU memory (ZeRO 1, 2, 3)")
    offload_parameters: bool = execution_only(False, "keep the policy's weights in CPU memory (ZeRO 3)")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="raw DeepSpeed configuration keys, merged over the generated ones"
    )
    checkpoint_steps: PositiveInt | None = execution_only(
        None,
        f"optimizer steps between two checkpoints inside a round; null: one every {CHECKPOINT_MINUTES} minutes",
    )
    max_failures: NonNegativeInt = execution_only(1, "restarts of the worker group after a worker dies")

    @property
    def needs_reference(self) -> bool:
        """Whether the objective compares the policy with a reference."""
        return self.objective in WITH_REFERENCE

    @property
    def fewest_workers(self) -> int:
        """With how few workers training starts."""
        return self.num_workers if self.min_workers is None else self.min_workers

    @model_validator(mode="after")
    def _objective_has_what_it_reads(self) -> TrainConfig:
        if self.label_smoothing and self.objective != "dpo":
            raise ValueError(f"label_smoothing is part of objective dpo, found {self.objective}")
        if self.shuffle_labels and self.objective not in ("dpo", "ipo"):
            raise ValueError(f"shuffle_labels is for objectives dpo and ipo, found {self.objective}")
        if self.shuffle_labels and self.nll_coefficient:
            raise ValueError("shuffle_labels swaps preferences only: expected nll_coefficient 0")
        for name in ("length_normalized", "nll_coefficient"):
            if getattr(self, name) and not self.needs_reference:
                raise ValueError(f"{name} is for objectives {', '.join(WITH_REFERENCE)}, found {self.objective}")
        return self

    @model_validator(mode="after")
    def _reference_is_there(self) -> TrainConfig:
        if self.reference_mode == "adapter" and not self.lora.rank:
            raise ValueError("reference_mode adapter turns LoRA adapters off: expected lora.rank above 0, found 0")
        if self.reference_mode == "adapter" and self.reference == "initial":
            raise ValueError(
                "reference_mode adapter is the round's starting policy, since adapters are merged after every round; "
                "for reference initial choose colocated or cached"
            )
        if self.offload_reference and self.reference_mode != "colocated":
            raise ValueError(f"offload_reference needs reference_mode colocated, found {self.reference_mode}")
        return self

    @model_validator(mode="after")
    def _workers_and_memory(self) -> TrainConfig:
        check_at_most(("min_workers", self.fewest_workers), ("num_workers", self.num_workers))
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters needs zero_stage 3, found {self.zero_stage}")
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3, found 0")
        return self
