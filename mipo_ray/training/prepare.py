"""The policy and its reference as the configuration asks for them: for a round of training and for a profiled step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import distributed

from mipo_ray.config_train import TrainConfig
from mipo_ray.training.engine import policy_engine, reference_module
from mipo_ray.training.layout import Pair
from mipo_ray.training.reference import (
    Reference,
    adapter_reference,
    cached_reference,
    colocated_reference,
    compute_logprobs,
    read_logprobs,
    release_weights,
    write_logprobs,
)
from mipo_ray.training.step import plan_micro_batches


def policy_and_reference(
    policy_dir: str,
    reference_dir: str,
    train: TrainConfig,
    dtype: str,
    device: str,
    *,
    trust_remote_code: bool,
    steps: Callable[[], Iterable[Sequence[Pair]]],
    pair_count: int,
    cache: str | None,
) -> tuple[Any, Reference | None]:
    """The policy's engine (`engine.policy_engine`), and the reference where the objective has one.

    In reference mode cached the log-probs of all pairs are computed before the policy is loaded, so that there is never
    a second model beside it: `steps()` streams this worker's pairs of every step once, and `cache`, a directory on any
    filesystem, keeps the log-probs of the `pair_count` pairs of all workers; None: they are not kept. All workers must
    call this together.
    """
    place = (train, dtype, device)

    def frozen_copy() -> Any:
        return reference_module(reference_dir, *place, trust_remote_code=trust_remote_code)

    reference = None
    if train.needs_reference and train.reference_mode == "cached":
        reference = _cached_reference(frozen_copy, train, device, steps, pair_count, cache)
    engine = policy_engine(policy_dir, *place, trust_remote_code=trust_remote_code)
    if train.needs_reference and reference is None:
        reference = (
            adapter_reference(engine) if train.reference_mode == "adapter" else colocated_reference(frozen_copy())
        )
    return engine, reference


def _cached_reference(
    frozen_copy: Callable[[], Any],
    train: TrainConfig,
    device: str,
    steps: Callable[[], Iterable[Sequence[Pair]]],
    pair_count: int,
    cache: str | None,
) -> Reference:
    """The reference's log-probs of every pair, from the cache or computed into it.

    They are computed in the same micro-batches as training, so that policy and reference agree to the bit at step 0
    (to rounding, where a cache is used again with other workers or another layout).
    """
    stored = None if cache is None else read_logprobs(cache, pair_count)
    is_stored = torch.tensor(int(stored is not None), device=device)
    distributed.all_reduce(is_stored, distributed.ReduceOp.MIN)  # another worker may have looked a moment earlier
    if stored is None or not is_stored:
        module = frozen_copy()
        planned = (micro_batch for pairs in steps() for micro_batch in plan_micro_batches(pairs, train, device))
        stored = compute_logprobs(
            colocated_reference(module), ((micro_batch.pairs, micro_batch.batch) for micro_batch in planned)
        )
        release_weights(module)
        if cache is not None:
            write_logprobs(cache, stored)
            distributed.barrier()
    return cached_reference(stored)
