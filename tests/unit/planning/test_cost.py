"""Hours and dollars of the plan: by FLOPs, at the table's price or the user's own, and by earlier rounds.

python -m pytest tests/unit/planning/test_cost.py
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import cast, get_args

import pytest

from mipo_ray.config.cost import GpuName
from mipo_ray.config.recipe import ConfigError, load_config
from mipo_ray.config.yaml_text import load_yaml
from mipo_ray.models.shape import ModelShape
from mipo_ray.planning.cost import describe_cost, describe_task_cost
from mipo_ray.planning.earlier_runs import EarlierRuns, Measured
from mipo_ray.planning.estimates import round_work
from mipo_ray.planning.plan import Plan
from mipo_ray.planning.prices import TABLE, planned_gpu, price_table
from mipo_ray.ray_cluster.resources import Resources

# Llama-3.2-1B: 1,235,814,400 parameters.
ONE_BILLION = ModelShape(1_235_814_400, 16, 2048, 8192, 32, 8, 64, 128_256)
ON_GPUS, ON_CPUS = Resources(True, "bfloat16", 1, 1), Resources(False, "float32", 0, 0)
# Two rounds of 50 pair rows: 400 device seconds for 10,000 tokens, of 40 kept pairs 8,000 tokens in 100 seconds.
MEASURED = Measured(
    rounds=2,
    on_gpu=True,
    rows=100,
    kept=40,
    generated_tokens=10_000,
    generate_seconds=400,
    trained_tokens=8_000,
    train_seconds=100,
)


def plan_of(resources: Resources, *overrides: str, earlier: EarlierRuns | None = None) -> Plan:
    """As much of a plan as its cost is made of: a million prompts."""
    config, prompts = load_config(None, overrides), SimpleNamespace(rows=1_000_000)
    found = SimpleNamespace(config=config, resources=resources, prompts=prompts, earlier=earlier or EarlierRuns())
    return cast(Plan, found)


def lines(plan: Plan, shape: ModelShape | str = ONE_BILLION) -> dict[str, str]:
    work = round_work(plan.config, rows=1_000_000, characters=400_000_000, responses=2_000_000)
    return {line[:16].strip(): line[16:] for line in describe_cost(plan, shape, work)}


def dollars(line: str) -> list[float]:
    return [float(amount.replace(",", "")) for amount in re.findall(r"\$([\d,.]*\d)", line)]


def test_the_table_has_a_date_and_every_gpu_that_may_be_named() -> None:
    """One knows how old a price is and where it is from; the configuration names what the table has, and no more."""
    table = load_yaml(TABLE.read_text())
    assert re.fullmatch(r"20\d\d-\d\d", table["date"])
    assert tuple(price_table()) == tuple(table["gpus"]) == get_args(GpuName)
    assert all("https://" in row["source"] for row in table["gpus"].values())
    with pytest.raises(ConfigError, match=r"^cost\.gpu: .*H100"):
        load_config(None, ["cost.gpu=TPU"])


def test_hours_by_flops_become_dollars_at_the_list_price() -> None:
    found = lines(plan_of(ON_GPUS, "rounds=3"))
    # 2 x 1.2358e9 x (200e6 + 148e6) / 395.6e12 + 2 x 1.2358e9 x 96e6 / 98.9e12 = 4,573 s;
    # 8 x 1.2358e9 x 196e6 / 395.6e12 = 4,898 s.
    assert found["GPU hours"].startswith(
        "estimate per round: 1.27 to generate, 1.36 to train, on H100s of 989 TFLOP/s (bfloat16) used to 40% for "
    )
    hours, price = (4573 + 4898) / 3600, price_table()["H100"].dollars_per_hour
    assert dollars(found["cost"]) == pytest.approx([hours * price, 3 * hours * price, price], abs=0.01)
    assert "list price of 20" in found["cost"]
    assert "which changes" in found["cost"]
    assert "not in it: evaluation" in found["cost"]


def test_a_price_of_ones_own_and_another_gpu() -> None:
    """Half the peak takes twice the hours; the price that one pays stands in place of the table's."""
    found = lines(plan_of(ON_GPUS, "cost.gpu=A100", "cost.gpu_hour_dollars=1.1", "rounds=1"))
    hours = (4573 + 4898) / 3600 * 989 / 312
    assert "on A100s of 312 TFLOP/s" in found["GPU hours"]
    assert dollars(found["cost"]) == pytest.approx([1.1 * hours, 1.1 * hours, 1.1], abs=0.01)
    assert "list price" not in found["cost"]
    assert planned_gpu(load_config(None, ["cost.gpu=L4"]).cost).dollars_per_hour == price_table()["L4"].dollars_per_hour


def test_earlier_rounds_stand_in_place_of_the_assumptions() -> None:
    """Also of a model whose shape is not known. A million rows are 10,000 times the measured ones, in two epochs."""
    earlier = EarlierRuns((("/runs/before", MEASURED),), ("/runs/other: seed",))
    found = lines(plan_of(ON_GPUS, "train.epochs=2", "rounds=1", earlier=earlier), "not downloaded yet")
    assert found["measured"] == (
        "by 2 rounds of /runs/before: per round 100 million tokens generated, 40% of the pairs kept, 160 million "
        "tokens trained on"
    )
    # 4 s a row to generate; 1 s a row and epoch to train.
    assert found["GPU hours"] == "as measured, per round: 1,111.1 to generate, 555.6 to train, on the GPUs they had"
    assert dollars(found["cost"])[0] == pytest.approx(6e6 / 3600 * price_table()["H100"].dollars_per_hour, rel=1e-4)
    assert "with the starts and the waiting" in found["cost"]
    assert found["earlier run"] == "not used: /runs/other: seed"
    # Two samples of a prompt are two pair rows, whatever the number of negatives.
    samples = ["generation.samples_per_prompt=2", "generation.negatives_per_prompt=4", "train.epochs=2"]
    twice = lines(plan_of(ON_GPUS, *samples, earlier=earlier))
    assert twice["GPU hours"].startswith("as measured, per round: 2,222.2 to generate, 1,111.1 to train")


def test_cpus_cost_time_and_no_dollars() -> None:
    """What GPUs took says nothing of CPUs, and without a measurement there is no estimate for them."""
    on_gpus = EarlierRuns((("/runs/before", MEASURED),))
    assert lines(plan_of(ON_CPUS, earlier=on_gpus)) == {"earlier run": "not used: /runs/before: GPUs there, CPUs here"}
    on_cpus = EarlierRuns((("/runs/before", Measured(**{**vars(MEASURED), "on_gpu": False})),))
    found = lines(plan_of(ON_CPUS, "rounds=1", earlier=on_cpus))
    assert list(found) == ["measured", "time"]
    assert found["time"].startswith("as measured, per round: 66,666.7 minutes to generate, 16,666.7 minutes to train")


def test_without_a_shape_or_a_measurement_there_is_no_cost() -> None:
    assert lines(plan_of(ON_GPUS), "org/name was not downloaded yet") == {}


def test_accuracy_tasks_have_gpu_hours_too() -> None:
    (line,) = describe_task_cost(ON_GPUS, price_table()["H100"], ONE_BILLION, 400_000_000, 96_000_000)
    # 2 x 1.2358e9 x 100e6 / 395.6e12 + 2 x 1.2358e9 x 96e6 / 98.9e12 = 3,024 s.
    assert line.endswith(
        "100 million prompt tokens without the prefix cache, up to 96 million generated; 0.84 GPU hours"
    )
    (line,) = describe_task_cost(ON_CPUS, price_table()["H100"], ONE_BILLION, 400_000_000, 96_000_000)
    assert "GPU" not in line
