"""Every metric of a run: its name, what it counts, and which event it comes from. Pure: no Ray.

An event of metrics.jsonl has short keys (`loss`); a Prometheus series stands among those of other programs and says
whose it is, of what, and in which unit (`mipo_train_loss_nats`). This table is the only place that maps one to the
other; monitoring, the Grafana dashboard and the tests read it. A number of an event that is not here is written to
metrics.jsonl and to the trackers alone.

Names are mipo_<thing>_<unit>, units as Prometheus writes them: seconds, bytes, tokens, nats, ratio (a share from 0 to
1), and _total at the end of counters. Three have no unit: stage_active (0 or 1), gradient_norm and learning_rate. Ray's
endpoint puts `ray_` before each. All have the labels run, round ("base" before round 0) and stage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from mipo_ray import measures
from mipo_ray.measures import Measure

LABELS = ("run", "round", "stage")
MOST_LABEL_CHARACTERS = 200

# Upper bounds of the histogram's buckets, seconds.
BUCKETS_SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)

# URLs in which what stands before the @ is a container, and no user.
_CONTAINER_BEFORE_HOST = ("abfs", "abfss", "wasb", "wasbs")


@dataclass(frozen=True)
class Metric:
    """A metric and the event that it is read from.

    event, key: the kind of the event and the number in it; a key of "" is the event itself (see monitoring).
    labels: what it is told apart by beyond LABELS; fields of the event.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    unit: str
    help: str
    event: str
    key: str
    labels: tuple[str, ...] = ()

    @property
    def series(self) -> str:
        """What Prometheus calls it."""
        return f"ray_{self.name}"


def _gauges(event: str, thing: str, *rows: tuple[str, str, str, str]) -> tuple[Metric, ...]:
    """Gauges of one event; each row is key, rest of the name, unit, help."""
    return tuple(Metric(f"mipo_{thing}_{name}", "gauge", unit, help, event, key) for key, name, unit, help in rows)


_ENGINE = ("engine",)
_IDLE_HELP = (
    "GPU seconds that engines, scorers and training workers held reserved and did no work in, from their start to the "
    "end of their last work: loading models, waiting for input"
)

STAGES = (
    Metric("mipo_stage_active", "gauge", "", "1 while the stage runs, 0 once it is committed", "", ""),
    Metric(
        "mipo_stage_last_progress_timestamp_seconds",
        "gauge",
        "seconds",
        "when the stage last reported anything but an engine's death, seconds since the epoch",
        "",
        "",
    ),
    Metric(
        "mipo_stage_duration_seconds",
        "gauge",
        "seconds",
        "from the stage's start (of this process) to its commit",
        "stage",
        "stage_seconds",
    ),
    Metric(
        "mipo_stage_written_bytes_total",
        "counter",
        "bytes",
        "size of the files of committed stages",
        "stage",
        "written_bytes",
    ),
)

ENGINES = (
    Metric(
        "mipo_engine_starts_total",
        "counter",
        "starts",
        "engines started; more than the pool holds are restarts",
        "engine_start",
        "engine_starts",
    ),
    Metric(
        "mipo_engine_start_duration_seconds",
        "gauge",
        "seconds",
        "from the engine's creation until it takes requests",
        "engine_start",
        "engine_start_seconds",
        _ENGINE,
    ),
    Metric(
        "mipo_weight_swaps_total",
        "counter",
        "swaps",
        "policies whose weights went into a living engine, and were proven there",
        "weight_swap",
        "weight_swaps",
    ),
    Metric(
        "mipo_weight_swap_duration_seconds",
        "gauge",
        "seconds",
        "from the engine being told to hold a policy until it has proven that it does",
        "weight_swap",
        "weight_swap_seconds",
        _ENGINE,
    ),
    Metric(
        "mipo_weight_swap_failures_total",
        "counter",
        "failures",
        "living engines that did not take a policy's weights and were started anew; no series: none was",
        "weight_swap_failure",
        "weight_swap_failures",
    ),
    Metric(
        "mipo_engine_deaths_total",
        "counter",
        "deaths",
        "engines that died inside a living actor; no series: none did",
        "engine_death",
        "engine_deaths",
    ),
    Metric(
        "mipo_quarantined_prompts_total",
        "counter",
        "prompts",
        "prompts set aside because engines died of each, alone; no series: none was",
        "quarantined",
        "quarantined_prompts",
    ),
    Metric("mipo_generated_rows_total", "counter", "rows", "prompt rows sampled", "generated", "rows", _ENGINE),
    Metric(
        "mipo_generated_tokens_total",
        "counter",
        "tokens",
        "response tokens sampled; its rate is the speed of an engine",
        "generated",
        "generated_tokens",
        _ENGINE,
    ),
    Metric(
        "mipo_generated_block_duration_seconds",
        "histogram",
        "seconds",
        "time of one block of rows in an engine, sampling and scoring",
        "generated",
        "block_seconds",
    ),
    Metric(
        "mipo_engine_queued_blocks",
        "gauge",
        "blocks",
        "other blocks that the engine had in hand when it last finished one",
        "generated",
        "blocks_in_flight",
        _ENGINE,
    ),
    Metric("mipo_scored_responses_total", "counter", "responses", "responses scored", "scored", "scored_responses"),
    *(
        Metric("mipo_idle_gpu_seconds_total", "counter", "seconds", _IDLE_HELP, event, "idle_gpu_seconds")
        for event in ("generated", "scored", "train_step")
    ),
)

PAIRS = (
    Metric(
        "mipo_dropped_pairs_total",
        "counter",
        "pairs",
        "pair rows left out of training, by reason, told at the end of a generate stage",
        "dropped",
        "dropped_pairs",
        ("reason",),
    ),
    *_gauges(
        "pairs",
        "pairs",
        ("rows", "sampled_rows", "rows", "pair rows before filters"),
        ("kept", "kept_rows", "rows", "pair rows after filters"),
        ("pmi_count", "scored_rows", "rows", "kept pairs with a PMI"),
        ("pmi_mean", "pmi_mean_nats", "nats", "sampler's pointwise mutual information, mean over kept pairs"),
        ("pmi_low", "pmi_low_nats", "nats", "lower end of the mean PMI's 95 % interval"),
        ("pmi_high", "pmi_high_nats", "nats", "upper end of the mean PMI's 95 % interval"),
        ("pmi_standard_deviation", "pmi_standard_deviation_nats", "nats", "standard deviation of PMI over kept pairs"),
        ("pmi_below_zero_share", "pmi_below_zero_ratio", "ratio", "kept pairs whose PMI is below 0"),
        ("reward_mean", "reward_mean", "", "mean reward of the responses that a reward chose from"),
        ("reward_low", "reward_low", "", "lower end of its 95 % interval"),
        ("reward_high", "reward_high", "", "upper end of its 95 % interval"),
        ("reward_margin_mean", "reward_margin_mean", "", "reward of chosen less rejected, mean over kept pairs"),
        ("tokens_difference_mean", "length_difference_mean_tokens", "tokens", "chosen less rejected length, mean"),
        ("tokens_difference_low", "length_difference_low_tokens", "tokens", "lower end of its 95 % interval"),
        ("tokens_difference_high", "length_difference_high_tokens", "tokens", "upper end of its 95 % interval"),
        ("prompt_tokens", "prompt_tokens", "tokens", "tokens of the round's prompts"),
        ("generated_tokens", "response_tokens", "tokens", "tokens sampled for the round"),
        ("generated_tokens_per_pair", "tokens_per_kept_row", "tokens_per_kept_row", "tokens sampled per kept pair"),
        ("engine_prompt_tokens", "engine_prompt_tokens", "tokens", "prompt tokens that the engines were sent"),
        ("cached_prompt_tokens", "cached_prompt_tokens", "tokens", "of these, found in the prefix cache"),
        ("pairs_with_control_tokens", "control_token_pairs", "pairs", "with a control token inside a response"),
        ("trimmed_responses", "trimmed_responses", "responses", "of kept pairs, cut back to their last whole sentence"),
        ("prefix_cache_hit_rate", "prefix_cache_hit_ratio", "ratio", "share found in the prefix cache"),
        *(
            row
            for side in ("chosen", "rejected")
            for row in (
                (f"{side}_tokens", f"{side}_tokens", "tokens", f"tokens of kept {side} responses"),
                (f"{side}_tokens_mean", f"{side}_mean_tokens", "tokens", f"mean length of kept {side} responses"),
                (
                    f"{side}_tokens_standard_deviation",
                    f"{side}_standard_deviation_tokens",
                    "tokens",
                    f"standard deviation of the length of kept {side} responses",
                ),
                (f"{side}_truncated_share", f"{side}_truncated_ratio", "ratio", f"kept {side} responses cut short"),
                (
                    f"{side}_truncated_share_all_rows",
                    f"{side}_truncated_all_rows_ratio",
                    "ratio",
                    f"sampled {side} responses cut at the length limit",
                ),
                (f"{side}_distinct_2", f"{side}_distinct_2_ratio", "ratio", f"distinct bigrams of {side} responses"),
                (f"{side}_distinct_3", f"{side}_distinct_3_ratio", "ratio", f"distinct trigrams of {side} responses"),
                (f"{side}_duplicates", f"{side}_duplicate_responses", "responses", f"kept {side} texts seen before"),
            )
        ),
    ),
)

TRAINING = (
    Metric("mipo_trained_pairs_total", "counter", "pairs", "pairs trained on", "train_step", "pairs"),
    Metric(
        "mipo_trained_tokens_total",
        "counter",
        "tokens",
        "tokens trained on: each response with its prompt, without padding",
        "train_step",
        "tokens",
    ),
    Metric(
        "mipo_train_forward_tokens_total",
        "counter",
        "tokens",
        "tokens that went through the policy, shared prompts once, padding included",
        "train_step",
        "forward_tokens",
    ),
    *_gauges(
        "train_step",
        "train",
        ("step", "current_steps", "steps", "number of the newest optimizer step of the round, from 0"),
        ("total_steps", "planned_steps", "steps", "optimizer steps of the round"),
        ("padding_share", "padding_ratio", "ratio", "share of padding in the forward pass"),
        ("loss", "loss_nats", "nats", "loss of the step (objective ipo: nats squared)"),
        ("chosen_logprob", "chosen_logprob_nats", "nats", "log-prob of the chosen response, mean over pairs"),
        ("rejected_logprob", "rejected_logprob_nats", "nats", "log-prob of the rejected responses, mean over pairs"),
        ("chosen_reward", "chosen_reward_nats", "nats", "beta log (policy / reference) of the chosen response"),
        ("rejected_reward", "rejected_reward_nats", "nats", "beta log (policy / reference) of the rejected responses"),
        ("reward_margin", "reward_margin_nats", "nats", "chosen reward less rejected reward"),
        ("reward_accuracy", "reward_accuracy_ratio", "ratio", "pairs whose chosen reward is the higher one"),
        ("gradient_norm", "gradient_norm", "", "L2 norm of the gradient before clipping"),
        ("learning_rate", "learning_rate", "", "learning rate of the step"),
        ("step_seconds", "step_duration_seconds", "seconds", "time of the step"),
        ("tokens_per_second", "tokens_per_second", "tokens_per_second", "tokens trained on per second of the step"),
        (
            "memory_bytes",
            "peak_memory_bytes",
            "bytes",
            "most memory that the first worker held: its GPU's, else its own",
        ),
    ),
)

_UNITS_OF_RESULTS = {
    "share": "ratio",
    "nats": "nats",
    "nats per response": "nats",
    "nats per token": "nats_per_token",
    "tokens": "tokens",
}


def _held_out(measure: Measure) -> Metric:
    key, suffix = measure.name, _UNITS_OF_RESULTS[measure.unit]
    thing = key.removesuffix("_per_token").removesuffix("_tokens").removesuffix("_rate")
    return Metric(
        f"mipo_held_out_{thing}_{suffix}", "gauge", suffix, f"results.json: {key}, {measure.unit}", "results", key
    )


HELD_OUT = tuple(map(_held_out, measures.HELD_OUT.values()))

GUARD = _gauges(
    "guard",
    "guard",
    ("broken_bounds", "broken_bounds", "bounds", "bounds that the round's policy broke; it is not promoted above 0"),
)

METRICS = (*STAGES, *ENGINES, *PAIRS, *TRAINING, *HELD_OUT, *GUARD)


def run_label(url: str) -> str:
    """A run directory's URL as a label: without credentials, query and fragment, and of bounded length (its end)."""
    scheme, separator, rest = url.partition("://")
    if separator:
        host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
        user, _, address = host.rpartition("@")
        if user and scheme in _CONTAINER_BEFORE_HOST and ":" not in user:
            address = host
        url = f"{scheme}://{address}{slash}{path}"
    if len(url) > MOST_LABEL_CHARACTERS:
        url = "..." + url[3 - MOST_LABEL_CHARACTERS :]
    return url


def ascii_label(value: str) -> str:
    """A text as the value of a Ray metric's label: characters beyond ASCII percent-encoded, for Ray takes no others."""
    return "".join(character if character.isascii() else quote(character, errors="replace") for character in value)


def round_label(round_index: int | None) -> str:
    """A round as a label: its number, or "base" for what comes before round 0."""
    return "base" if round_index is None else str(round_index)
