"""The Grafana dashboard of a run, as JSON to import; the committed file beside this one is what it writes.

python cluster/grafana/dashboard.py                  writes cluster/grafana/mipo-ray.json

Series are named through mipo_ray.monitoring.metrics, so that a misspelt one fails here. vLLM's and Ray's own series are
listed below. Panels of GPUs stay empty on machines without one, and engine deaths where none died.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from mipo_ray.monitoring.metrics import METRICS  # noqa: E402

OUTPUT = Path(__file__).with_name("mipo-ray.json")

# Series of vLLM's engines and of Ray's nodes that panels show.
OTHER_SERIES = (
    "ray_vllm_num_requests_running",
    "ray_vllm_num_requests_waiting",
    "ray_vllm_kv_cache_usage_perc",
    "ray_vllm_generation_tokens_total",
    "ray_vllm_prompt_tokens_total",
    "ray_vllm_prefix_cache_queries_total",
    "ray_vllm_prefix_cache_hits_total",
    "ray_vllm_num_preemptions_total",
    "ray_node_cpu_utilization",
    "ray_node_mem_used",
    "ray_node_mem_total",
    "ray_node_gpus_utilization",
)

OURS = {metric.name: metric for metric in METRICS}
WHERE = '{run=~"$run"}'
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS, HEIGHT = 24, 8


def ours(name: str, suffix: str = "") -> str:
    """Selector of one of our series for the chosen runs; `suffix` names a histogram's part."""
    return f"{OURS['mipo_' + name].series}{suffix}{WHERE}"


def other(name: str) -> str:
    """Selector of a series of vLLM or Ray."""
    assert name in OTHER_SERIES, name
    return name


def rate(selector: str) -> str:
    """How fast a counter rises, per second."""
    return f"rate({selector}[$__rate_interval])"


def panel(title: str, *queries: tuple[str, str], unit: str = "short", kind: str = "timeseries", text: str = "") -> Any:
    """A panel; each query is an expression and the legend of its lines."""
    targets = [
        {
            "datasource": DATASOURCE,
            "expr": expression,
            "legendFormat": legend,
            "refId": chr(ord("A") + index),
            "instant": kind != "timeseries",
            "range": kind == "timeseries",
        }
        for index, (expression, legend) in enumerate(queries)
    ]
    options: dict[str, Any] = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
    }
    options["tooltip"] = {"mode": "multi", "sort": "desc"}
    if kind != "timeseries":
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    return {
        "title": title,
        "description": text,
        "type": kind,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "options": options,
        "targets": targets,
    }


def by(labels: str, function: str, expression: str) -> str:
    """An aggregation over everything but `labels`."""
    return f"{function} by ({labels}) ({expression})"


STAGE = "run, round, stage"
STAGE_LEGEND = "round {{round}} {{stage}}"
ROUND_LEGEND = "{{run}} round {{round}}"


def held_out(title: str, name: str, unit: str = "short", text: str = "") -> Any:
    """A held-out figure of every measured policy, one bar each."""
    return panel(title, (by("run, round", "max", ours(name)), ROUND_LEGEND), unit=unit, kind="bargauge", text=text)


def train(title: str, *names: str, unit: str = "short", text: str = "") -> Any:
    """Figures of the newest optimizer step over time."""
    queries = [(by("run, round", "max", ours(f"train_{name}")), f"round {{{{round}}}} {name}") for name in names]
    return panel(title, *queries, unit=unit, text=text)


ROWS: dict[str, list[Any]] = {
    "Now": [
        panel("Stage under way", (by(STAGE, "max", ours("stage_active")) + " == 1", STAGE_LEGEND), kind="stat"),
        panel(
            "Since the last progress",
            (
                f"time() - {by(STAGE, 'max', ours('stage_last_progress_timestamp_seconds'))} "
                f"and on ({STAGE}) {by(STAGE, 'max', ours('stage_active'))} == 1",
                STAGE_LEGEND,
            ),
            unit="s",
            kind="stat",
        ),
        panel("Rows sampled", (by(STAGE, "sum", ours("generated_rows_total")), STAGE_LEGEND), kind="stat"),
        panel("Pairs trained on", (by(STAGE, "sum", ours("trained_pairs_total")), STAGE_LEGEND), kind="stat"),
    ],
    "Generation": [
        panel(
            "Tokens per second, all engines",
            (by("run", "sum", rate(ours("generated_tokens_total"))), "responses, by finished block"),
            (f"sum({rate(other('ray_vllm_generation_tokens_total'))})", "vLLM, sampled"),
            (f"sum({rate(other('ray_vllm_prompt_tokens_total'))})", "vLLM, prompts"),
            text="vLLM counts every token at once, the responses are counted when their block of rows is finished.",
        ),
        panel(
            "Tokens per second of each engine",
            (by("engine", "sum", rate(ours("generated_tokens_total"))), "{{engine}}"),
            text="An engine is named by the beginning of its actor's id in the Ray dashboard.",
        ),
        panel(
            "Requests in the engines",
            (f"sum({other('ray_vllm_num_requests_running')})", "running"),
            (f"sum({other('ray_vllm_num_requests_waiting')})", "waiting"),
            (by("run", "sum", ours("engine_queued_blocks")), "blocks in hand"),
        ),
        panel(
            "KV cache in use",
            (f"max by (WorkerId) ({other('ray_vllm_kv_cache_usage_perc')})", "{{WorkerId}}"),
            unit="percentunit",
        ),
        panel(
            "Prefix cache hits",
            (
                f"sum({rate(other('ray_vllm_prefix_cache_hits_total'))}) / "
                f"sum({rate(other('ray_vllm_prefix_cache_queries_total'))})",
                "hits",
            ),
            unit="percentunit",
        ),
        panel(
            "Engines started, died, preempted requests",
            (by(STAGE, "sum", ours("engine_starts_total")), f"starts {STAGE_LEGEND}"),
            (by(STAGE, "sum", ours("engine_deaths_total")), f"deaths {STAGE_LEGEND}"),
            (by(STAGE, "sum", ours("quarantined_prompts_total")), f"prompts set aside {STAGE_LEGEND}"),
            (f"sum({other('ray_vllm_num_preemptions_total')})", "preemptions"),
        ),
        panel("Engine start", (by("engine", "max", ours("engine_start_duration_seconds")), "{{engine}}"), unit="s"),
        panel(
            "Time of a block",
            *(
                (
                    f"histogram_quantile({quantile}, "
                    f"{by('le', 'sum', rate(ours('generated_block_duration_seconds', '_bucket')))})",
                    f"{quantile:.0%}",
                )
                for quantile in (0.5, 0.95)
            ),
            unit="s",
        ),
    ],
    "Pairs": [
        panel(
            "Dropped pairs by reason",
            (by("round, reason", "sum", ours("dropped_pairs_total")), "round {{round}} {{reason}}"),
            kind="bargauge",
        ),
        panel(
            "Pairs sampled and kept",
            (by("run, round", "max", ours("pairs_sampled_rows")), "sampled, round {{round}}"),
            (by("run, round", "max", ours("pairs_kept_rows")), "kept, round {{round}}"),
            kind="bargauge",
        ),
        panel(
            "PMI of kept pairs, nats",
            (by("run, round", "max", ours("pairs_pmi_mean_nats")), ROUND_LEGEND),
            kind="bargauge",
        ),
        panel(
            "Sampled responses cut at the length limit",
            (by("run, round", "max", ours("pairs_chosen_truncated_all_rows_ratio")), "chosen, round {{round}}"),
            (by("run, round", "max", ours("pairs_rejected_truncated_all_rows_ratio")), "rejected, round {{round}}"),
            unit="percentunit",
            kind="bargauge",
        ),
    ],
    "Training": [
        train("Loss", "loss_nats"),
        train("Reward margin, nats", "reward_margin_nats", "chosen_reward_nats", "rejected_reward_nats"),
        train("Reward accuracy", "reward_accuracy_ratio", unit="percentunit"),
        train("Gradient norm", "gradient_norm"),
        train("Learning rate", "learning_rate", unit="sci"),
        train("Log-probs, nats", "chosen_logprob_nats", "rejected_logprob_nats"),
        train("Steps", "current_steps", "planned_steps"),
        train("Tokens per second", "tokens_per_second"),
    ],
    "Held-out prompts": [
        held_out(
            "PMI of answer and user context, nats", "held_out_context_pmi_initial_nats", text="Initial model's view."
        ),
        held_out("PMI of answer and prompt, nats", "held_out_pmi_initial_nats", text="Initial model's view."),
        held_out("InfoNCE on per-token log-probs, nats", "held_out_infonce_initial_nats"),
        held_out("Reward accuracy", "held_out_reward_accuracy_ratio", unit="percentunit"),
        held_out("Reward margin, nats", "held_out_reward_margin_nats"),
        held_out("Length, tokens", "held_out_response_tokens"),
        held_out("Cut at the length limit", "held_out_truncated_ratio", unit="percentunit"),
        held_out("Copied from the prompt", "held_out_copy_ratio", unit="percentunit"),
        held_out("Different bigrams over all answers", "held_out_corpus_distinct_2_ratio", unit="percentunit"),
        held_out("KL from the initial model, nats per token", "held_out_kl_nats_per_token"),
        held_out("Bounds of the guard that are broken", "guard_broken_bounds", text="Above 0: not promoted."),
    ],
    "Time, storage, machines": [
        panel(
            "Duration of stages",
            (by(STAGE, "max", ours("stage_duration_seconds")), STAGE_LEGEND),
            unit="s",
            kind="bargauge",
        ),
        panel(
            "Written",
            (by(STAGE, "max", ours("stage_written_bytes_total")), STAGE_LEGEND),
            unit="bytes",
            kind="bargauge",
        ),
        panel(
            "Reserved GPUs without work",
            (by("run, stage", "sum", rate(ours("idle_gpu_seconds_total"))), "{{stage}}"),
            text="GPU seconds per second: how many reserved GPUs loaded a model or waited for input. "
            + OURS["mipo_idle_gpu_seconds_total"].help
            + ".",
        ),
        panel("CPU", (f"avg by (instance) ({other('ray_node_cpu_utilization')})", "{{instance}}"), unit="percent"),
        panel(
            "Memory",
            (f"max by (instance) ({other('ray_node_mem_used')} / {other('ray_node_mem_total')})", "{{instance}}"),
            unit="percentunit",
        ),
        panel(
            "GPU",
            (f"sum by (instance, GpuIndex) ({other('ray_node_gpus_utilization')})", "{{instance}} {{GpuIndex}}"),
            unit="percent",
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """The dashboard's JSON model: a row of panels for each entry of ROWS, four panels wide."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(
            {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _place(top, 0, COLUMNS, 1)}
        )
        top += 1
        width = COLUMNS // 4
        for index, one in enumerate(row):
            panels.append({**one, "gridPos": _place(top + index // 4 * HEIGHT, index % 4 * width, width, HEIGHT)})
        top += -(-len(row) // 4) * HEIGHT
    return {
        "uid": "mipo-ray",
        "title": "mipo-ray",
        "tags": ["mipo-ray", "ray"],
        "timezone": "browser",
        "schemaVersion": 38,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                {
                    "name": "run",
                    "label": "Run",
                    "type": "query",
                    "datasource": DATASOURCE,
                    "query": {"query": f"label_values({OURS['mipo_stage_active'].series}, run)", "refId": "run"},
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": [{**one, "id": number} for number, one in enumerate(panels, 1)],
    }


def _place(top: int, left: int, width: int, height: int) -> dict[str, int]:
    return {"x": left, "y": top, "w": width, "h": height}


def render() -> str:
    """The text of the JSON file."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(render(), encoding="utf-8")
    print(OUTPUT.relative_to(REPOSITORY))
