"""Hours and dollars of a round for `--dry-run`: by FLOPs and a peak where nothing was measured, else by earlier rounds.

What is assumed stands in the lines themselves. The price table is `prices.yaml`; a run's own price is
`cost.gpu_hour_dollars`.
"""

from __future__ import annotations

from mipo_ray.models.shape import ModelShape
from mipo_ray.planning.earlier_runs import Measured
from mipo_ray.planning.estimates import CHARACTERS_PER_TOKEN, RoundWork, count, generation_flops, training_flops
from mipo_ray.planning.plan import Plan
from mipo_ray.planning.prices import Gpu, planned_gpu
from mipo_ray.ray_cluster.resources import Resources

# What part of a GPU's dense peak is assumed: for prompts and scoring, for decoding (which waits for memory), for
# training.
PREFILL_SHARE, DECODE_SHARE, TRAIN_SHARE = 0.4, 0.1, 0.4


def describe_cost(plan: Plan, shape: ModelShape | str, work: RoundWork) -> list[str]:
    """Lines for the plan: hours and, on GPUs, dollars of a round and of the run, without evaluation."""
    config, resources = plan.config, plan.resources
    measured = plan.earlier.measured(on_gpu=resources.on_gpu)
    lines = [f"earlier run     not used: {reason}" for reason in plan.earlier.not_used(on_gpu=resources.on_gpu)]
    if measured is not None:
        rows = plan.prompts.rows * config.generation.samples_per_prompt
        seconds = measured.seconds(rows, config.train.epochs)
        lines += _describe_measured(plan, measured, rows)
        included = "with the starts and the waiting that those rounds had"
    elif resources.on_gpu and isinstance(shape, ModelShape):
        gpu = planned_gpu(config.cost)
        peak = gpu.peak_flops[resources.dtype]
        seconds = (
            generation_seconds(gpu, shape, resources, work),
            training_flops(shape, config.train, work) / (peak * TRAIN_SHARE),
        )
        lines.append(
            f"GPU hours       estimate per round: {_hours(seconds[0])} to generate, {_hours(seconds[1])} to train, on "
            f"{gpu.name}s of {peak / 1e12:g} TFLOP/s ({resources.dtype}) used to {PREFILL_SHARE:.0%} for prompts, "
            f"{DECODE_SHARE:.0%} for decoding, {TRAIN_SHARE:.0%} for training"
        )
        included = "without starts and GPUs that wait"
    else:
        return lines
    return [*lines, _dollars(plan, sum(seconds) / 3600, included)] if resources.on_gpu else lines


def _describe_measured(plan: Plan, measured: Measured, rows: int) -> list[str]:
    """How a round of so many pair rows will be, if it is like the measured ones."""
    on_gpu, epochs = plan.resources.on_gpu, plan.config.train.epochs
    generated, trained = measured.tokens(rows, epochs)
    seconds = measured.seconds(rows, epochs)
    label, shown, device = ("GPU hours", _hours, "on the GPUs they had")
    if not on_gpu:
        label, shown, device = ("time", _minutes, "divided by the engines and by the workers")
    rounds = f"{measured.rounds} round{'s' if measured.rounds > 1 else ''}"
    places = ", ".join(plan.earlier.places(on_gpu=on_gpu))
    return [
        f"measured        by {rounds} of {places}: per round {count(generated)} tokens "
        f"generated, {measured.kept / measured.rows:.0%} of the pairs kept, {count(trained)} tokens trained on",
        f"{label:<16}as measured, per round: {shown(seconds[0])} to generate, {shown(seconds[1])} to train, {device}",
    ]


def _dollars(plan: Plan, hours: float, included: str) -> str:
    gpu, rounds = planned_gpu(plan.config.cost), plan.config.rounds
    each = hours * gpu.dollars_per_hour
    return (
        f"cost            {_money(each)} per round, {_money(rounds * each)} for {rounds}: {_hours(3600 * hours)} hours "
        f"at ${gpu.dollars_per_hour:,.2f} for one {gpu.name} ({gpu.price}), {included}; not in it: evaluation, other "
        "machines, disks, traffic"
    )


def describe_task_cost(
    resources: Resources, gpu: Gpu, shape: ModelShape | str, characters: int, generated: int
) -> list[str]:
    """A line for the plan: the accuracy tasks of one policy, which read `characters` and sample `generated` tokens."""
    prompt_tokens = characters / CHARACTERS_PER_TOKEN
    line = (
        f"task work       estimate per policy: {count(prompt_tokens)} prompt tokens without the prefix cache, up to "
        f"{count(generated)} generated"
    )
    if isinstance(shape, str) or not resources.on_gpu:
        return [line]
    work = RoundWork(prompt_tokens, generated, 0.0, 0.0)
    return [f"{line}; {_hours(generation_seconds(gpu, shape, resources, work))} GPU hours"]


def generation_seconds(gpu: Gpu, shape: ModelShape, resources: Resources, work: RoundWork) -> float:
    """GPU seconds of reading, scoring and decoding at the assumed shares of the peak."""
    peak = gpu.peak_flops[resources.dtype]
    read, decoded = generation_flops(shape, work)
    return read / (peak * PREFILL_SHARE) + decoded / (peak * DECODE_SHARE)


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.1f}" if hours >= 100 else f"{hours:.3g}" if hours >= 0.001 or not hours else "less than 0.001"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:,.1f} minutes"


def _money(dollars: float) -> str:
    return f"${dollars:,.2f}" if dollars >= 0.01 else "less than $0.01"
