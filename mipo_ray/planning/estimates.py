"""Estimates for `--dry-run`: memory of a training worker and of an engine, tokens and FLOPs of a round.

Arithmetic over the model's shape and the configuration; nothing is measured. What it assumes is printed beside it, and
what it leaves out stands with each function. Bytes and tokens throughout. No torch, no Ray.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mipo_ray.config.schema import Config
from mipo_ray.config.train import TrainConfig
from mipo_ray.models.shape import ModelShape
from mipo_ray.pairs.given import PairSummary
from mipo_ray.ray_cluster.resources import Resources

BYTES = {"float32": 4, "bfloat16": 2}
CHARACTERS_PER_TOKEN = 4
# logprobs.CHUNK_BYTES and GPU_CHUNK_BYTES: one chunk of float32 logits, and a second one in backward.
LOGIT_BYTES, GPU_LOGIT_BYTES = 2 * 128 * 1024**2, 2 * 512 * 1024**2
# DeepSpeed's default reduce_bucket_size and stage3_prefetch_bucket_size, in elements.
REDUCE_BUCKET, PREFETCH_BUCKET = 500_000_000, 50_000_000


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one training worker: parts on its device, and what is offloaded to its node's memory (`host`)."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    activations: float
    logits: float
    buffers: float
    host: float

    @property
    def device(self) -> float:
        """All parts on the device."""
        held = self.weights + self.gradients + self.optimizer + self.reference
        return held + self.activations + self.logits + self.buffers


def training_memory(shape: ModelShape, train: TrainConfig, dtype: str, workers: int, *, on_gpu: bool) -> TrainingMemory:
    """What a worker of so many holds at its peak; without fragmentation, the CUDA context and NCCL's buffers.

    Gradients are kept in float32; optimizer states are a float32 copy of what is trained (ZeRO, bfloat16) and Adam's
    two moments. Activations are those of attention that keeps no score matrix and a gated MLP.
    """
    width = BYTES[dtype]
    stage = max(train.zero_stage, 1) if dtype == "bfloat16" else train.zero_stage
    adapters = lora_parameters(shape, train.lora.rank)
    trained = adapters or shape.parameters
    host = 0.0

    weights = (shape.parameters + adapters) * width / (workers if stage == 3 else 1)
    gradients = trained * 4 / (workers if stage >= 2 else 1)
    optimizer = trained * (12 / workers if stage else 8)
    live_reference = train.needs_reference and train.reference_mode == "colocated"
    sharded_reference = stage == 3 or train.offload_reference
    reference = live_reference * shape.parameters * width / (workers if sharded_reference else 1)
    if train.offload_parameters:
        host, weights = host + weights, 0.0
    if train.offload_optimizer:
        host, gradients, optimizer = host + gradients + optimizer, 0.0, 0.0
    if train.offload_reference:
        host, reference = host + reference, 0.0
    return TrainingMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        reference=reference,
        activations=_activations(shape, train, width),
        logits=min(GPU_LOGIT_BYTES if on_gpu else LOGIT_BYTES, 2 * train.micro_batch_tokens * shape.vocabulary * 4),
        buffers=_buffers(shape, train, stage, dtype, math.inf if on_gpu else trained),
        host=host,
    )


def lora_parameters(shape: ModelShape, rank: int) -> int:
    """Parameters of adapters of every linear layer but the output head."""
    query, key = shape.heads * shape.head_width, shape.key_heads * shape.head_width
    attention = 2 * (shape.hidden + query) + 2 * (shape.hidden + key)
    return rank * shape.layers * (attention + 3 * (shape.hidden + shape.intermediate))


def _activations(shape: ModelShape, train: TrainConfig, width: int) -> float:
    query, key = shape.heads * shape.head_width, shape.key_heads * shape.head_width
    # Norms keep their float32 input beside what they give; queries and keys are kept before and after rotation.
    layer = width * (4 * shape.hidden + 3 * query + 3 * key + 4 * shape.intermediate) + 8 * shape.hidden
    token = shape.layers * width * shape.hidden + layer if train.gradient_checkpointing else shape.layers * layer
    return float(train.micro_batch_tokens * token)


def _buffers(shape: ModelShape, train: TrainConfig, stage: int, dtype: str, most: float) -> float:
    """DeepSpeed's buffers; of the one for gradients `most` elements exist: a CPU gives memory only where it is used."""
    if not stage:
        return 0.0
    width = BYTES[dtype]
    zero = train.deepspeed.get("zero_optimization") or {}
    # ZeRO-1 sums its gradients in float32.
    bucket = min(zero.get("reduce_bucket_size", REDUCE_BUCKET), most) * (4 if stage == 1 else width)
    if stage < 3:
        return bucket
    # The layers that are gathered for the moment: one at work, and those that are fetched ahead.
    return bucket + width * (shape.parameters / shape.layers + min(PREFETCH_BUCKET, shape.parameters))


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on each of an engine's devices: its weights, and the KV cache of one token and of one full window."""

    weights: float
    cache_token: float
    cache_window: float


def engine_memory(shape: ModelShape, dtype: str, shards: int, window: int) -> EngineMemory:
    """vLLM gives what is left of its share of the device (gpu_memory_utilization) to the KV cache."""
    # A key head is on one device at least.
    token = 2 * shape.layers * -(-shape.key_heads // shards) * shape.head_width * BYTES[dtype]
    return EngineMemory(shape.parameters * BYTES[dtype] / shards, token, token * window)


@dataclass(frozen=True)
class RoundWork:
    """Tokens of one round, at most: read as prompts, generated, read again to score PMI, and trained on."""

    prompt_tokens: float
    generated_tokens: float
    scored_tokens: float
    trained_tokens: float


def round_work(config: Config, rows: int, characters: int, responses: int) -> RoundWork:
    """The work of a round over `rows` prompts of so many characters in all; every response as long as it may be."""
    prompt_tokens = characters / rows / CHARACTERS_PER_TOKEN
    generation, train = config.generation, config.train
    pairs = rows * generation.samples_per_prompt
    longest = generation.sampling.max_tokens
    sequences = 1 + (0 if train.objective == "sft" else generation.rejected_per_pair)
    prompts = 1 if train.layout == "shared" else sequences
    under = generation.rejected_per_pair  # of a chosen response, mismatched prompts
    if not config.preference.is_mipo:
        under = config.preference.samples * generation.negatives_per_prompt
    scored = pairs * under if config.scores_pmi else 0
    return RoundWork(
        prompt_tokens=responses * prompt_tokens,
        generated_tokens=responses * longest,
        scored_tokens=scored * (prompt_tokens + longest),
        trained_tokens=train.epochs * pairs * (prompts * prompt_tokens + sequences * longest),
    )


def given_work(config: Config, pairs: PairSummary) -> RoundWork:
    """The work of a round on pairs that exist, which are as long as they are."""
    train = config.train
    sequences = 1 + pairs.rejected
    responses = pairs.response_characters * (1 / sequences if train.objective == "sft" else 1)
    prompts = 1 if train.layout == "shared" or train.objective == "sft" else sequences
    return RoundWork(
        prompt_tokens=0.0,
        generated_tokens=0.0,
        scored_tokens=0.0,
        trained_tokens=train.epochs * (prompts * pairs.prompt_characters + responses) / CHARACTERS_PER_TOKEN,
    )


def generation_flops(shape: ModelShape, work: RoundWork) -> tuple[float, float]:
    """FLOPs of prompts and scoring, and of decoding: 2 per parameter and token, without attention's own."""
    read = work.prompt_tokens + work.scored_tokens
    return 2.0 * shape.parameters * read, 2.0 * shape.parameters * work.generated_tokens


def training_flops(shape: ModelShape, train: TrainConfig, work: RoundWork) -> float:
    """FLOPs of training: 2 forward and 4 backward per parameter and token, 2 more for checkpoints and the reference."""
    per_token = 6 + 2 * train.gradient_checkpointing + 2 * train.needs_reference
    return float(per_token * shape.parameters * work.trained_tokens)


def describe_estimates(config: Config, resources: Resources, shape: ModelShape | str, work: RoundWork) -> list[str]:
    """Lines for the plan: a round's work, and the memory it takes. `shape` is the reason where it is not known."""
    lines = [
        f"work            estimate per round, without evaluation: {count(work.prompt_tokens)} prompt tokens, up to "
        f"{count(work.generated_tokens)} generated, {count(work.scored_tokens)} scored, "
        f"{count(work.trained_tokens)} trained on ({CHARACTERS_PER_TOKEN} characters a token, no filters)"
    ]
    if isinstance(shape, str):
        return [*lines, f"memory          no estimate: {shape}"]
    train = config.train
    memory = training_memory(shape, train, resources.dtype, train.fewest_workers, on_gpu=resources.on_gpu)
    parts = ", ".join(
        f"{name} {size(getattr(memory, name))}"
        for name in ("weights", "gradients", "optimizer", "reference", "activations", "logits", "buffers")
        if getattr(memory, name)
    )
    offloaded = f"; {size(memory.host)} more in its node's memory" if memory.host else ""
    lines.append(
        f"worker memory   estimate of each of {train.fewest_workers}: {size(memory.device)}: {parts}{offloaded}"
    )
    if not config.starts_engines:
        return lines
    engine = engine_memory(
        shape, resources.dtype, config.generation.pool.tensor_parallel_size, config.model.max_model_len
    )
    return [
        *lines,
        f"engine memory   estimate for each of its devices: weights {size(engine.weights)}, KV cache "
        f"{size(engine.cache_window)} for one window of {config.model.max_model_len:,} tokens; vLLM takes more for it",
    ]


def size(amount: float) -> str:
    """Bytes for people."""
    return f"{amount / 1024**3:,.1f} GiB" if amount >= 1024**3 else f"{amount / 1024**2:,.0f} MiB"


def count(amount: float) -> str:
    """An amount in three digits, for the plan."""
    for unit, name in ((1e9, " billion"), (1e6, " million")):
        if amount >= unit:
            return f"{amount / unit:.3g}{name}"
    return f"{amount:,.0f}" if amount >= 1 or not amount else "less than 1"
