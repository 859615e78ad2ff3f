"""Made-up runs for the report's tests: a plain one whose figures tests count on, and a rich one with every section.

The rich run's figures are drawn from a seeded generator; they are no results.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pyarrow as pa

from mipo_ray.evaluation.significance import mean_entry, share_entry
from mipo_ray.measures import HELD_OUT, JUDGED, TASKS
from mipo_ray.pairs.schema import PAIR_SCHEMA, as_version_2
from mipo_ray.pairs.statistics import merge_statistics, pair_statistics
from mipo_ray.report.cost import ShownStage
from mipo_ray.report.page import ReportData
from mipo_ray.storage.entries import Entry, Evaluated, Evaluation, Results
from mipo_ray.storage.gains import GainGroup, Gains, GainsBy
from mipo_ray.storage.manifests import Matrices, Matrix
from mipo_ray.storage.pair_statistics import PairStatistics


def entry(name: str, value: float, change: float | None = None, spread: float = 0.05) -> Entry:
    made: dict[str, Any] = {
        "value": value,
        "low": value - spread,
        "high": value + spread,
        "n": 64,
        "unit": HELD_OUT[name].unit,
    }
    if change is not None:
        made |= {"change": change, "change_low": change - spread, "change_high": change + spread}
    if name.startswith("infonce"):
        made["ceiling"] = math.log(4)
    if name == "corpus_distinct_2":
        made |= dict.fromkeys([key for key in made if key.endswith(("low", "high"))])
    return Entry(**made)


def make_results(**changes: float) -> Results:
    """A base with all figures at 4.321 and two rounds that move only by the given changes."""
    base = {name: entry(name, 4.321) for name in HELD_OUT}
    rounds = {name: entry(name, 4.321 + changes.get(name, 0.0), changes.get(name, 0.0)) for name in HELD_OUT}
    return {"base": base, "1": rounds, "0": dict(rounds)}


def make_statistics(
    text: str = "some text", scored: bool = True, strategies: tuple[str, str] | None = None
) -> PairStatistics:
    """Ten rows: the last is dropped for the reason `text`; strategies of the first two (default `text`), and others."""
    first, others = strategies or (text, "random_prompt")
    rows = [
        {
            "prompt_id": str(index),
            "sample": 0,
            "strategy": first if index < 2 else others,
            "dropped": text if index == 9 else "",
            "pmi": index - 2.5 if scored else None,
            "prompt_token_ids": [1],
            "chosen": "tea",
            "chosen_token_ids": [1] * (20 + index),
            "chosen_finish_reason": "stop" if index else "length",
            "rejected": str(index),
            "rejected_token_ids": [1] * 30,
            "rejected_finish_reason": "stop",
            "generated_tokens": 90,
            "engine_prompt_tokens": 200,
            "cached_prompt_tokens": 50,
        }
        for index in range(10)
    ]
    table = as_version_2(pa.Table.from_pylist(rows, schema=PAIR_SCHEMA))
    return merge_statistics([pair_statistics(table)])


def make_run(text: str = "some text", **fields: Any) -> ReportData:
    steps = [
        {"round": number, "step": step, "loss": math.log(2) - 0.01 * step, "reward_margin": 0.1 * step,
         "reward_accuracy": 0.5 + 0.02 * step, "learning_rate": 1e-5 / step, "gradient_norm": math.nan}
        for number in (0, 1) for step in range(1, 13)
    ]  # fmt: skip
    run = ReportData(
        title=text,
        config_yaml=f"seed: 0\nnote: {text}\n",
        results=make_results(context_pmi_initial=2.5, reward_accuracy=0.25),
        train_steps=steps,
        stages=[
            ShownStage("base", "evaluate", 61.4),
            ShownStage(0, "generate", 7384, counts={text: 96}),
        ],
        pair_statistics={0: make_statistics(text.encode("utf-8", "replace").decode())},  # a pair is always UTF-8
        example_pairs=[
            {"prompt": text, "context": text, "chosen": text, "rejected": [{"text": "", "mismatched": text}]}
        ]
        * 20,
        answers=[
            {
                "prompt": text,
                "context": None,
                "base_answer": text,
                "base_pmi": 3.25,
                "final_answer": text,
                "final_pmi": 11.5,
            }
        ],
        versions={"ray": text},
    )
    return dataclasses.replace(run, **fields)


USERS = [
    "I am a puppeteer in a travelling caravan on the steppe, with one suitcase, a goat, and no fixed address.",
    "I am an ice-cream seller at an inland amusement park, avoiding sugar myself, and idle from November to March.",
    "I am a marine biologist on an ocean-going research ship, sharing one galley with thirty people.",
    "I am a jeweller in a tiny city-state, dress formally six days a week, and practise archery on Sundays.",
    "I am a firefighter in a eucalyptus woodland district and work twenty-four-hour shifts.",
    "I am a glass blower on a lagoon island without cars, live above my workshop, and collect carnival masks.",
    "I am a night nurse with two small children and a very small kitchen.",
    "I am a retired surveyor who walks with a stick and reads maps for pleasure.",
]
QUESTION = "Which picnic spot and basket would you choose for me?"
JUDGE_PROMPT = (
    "You compare two answers to one user.\n\nWhat is known of the user: {{ context }}\nQuestion: {{ question }}\n\n"
    "Answer A: {{ first }}\n\nAnswer B: {{ second }}\n\nWhich answer suits this user better? "
    "End with one line: [[A]], [[B]] or [[tie]]."
)
CHECKS = {"position_bias": 0.08, "self_consistency": 0.81, "unreadable": 0.04}
LONG_WORD = "Donaudampfschifffahrtselektrizitaetenhauptbetriebswerkbauunterbeamtengesellschaft" * 3


def make_matrix(generator: np.random.Generator, gain: float) -> Matrices:
    """Eight answers that are `gain` nats likelier under their own conditioning."""

    def logprobs() -> list[list[float]]:
        table = -60 + generator.normal(0, 3, size=(8, 8)) + generator.normal(0, 8, size=(8, 1))
        return (table + gain * np.eye(8)).tolist()

    def part(labels: list[str]) -> Matrix:
        ids = [f"user-{index}" for index in range(8)]
        return Matrix(prompt_ids=ids, labels=labels, initial=logprobs(), policy=logprobs())

    return {"prompts": part([f"{user}\n{QUESTION}" for user in USERS]), "contexts": part(USERS)}


def make_evaluation(generator: np.random.Generator) -> Evaluation:
    """Two tasks (one better, one not distinguishable) and both protocols of the judge, for the base and two rounds."""
    evaluation: Evaluation = {"base": {}, "0": {}, "1": {}}
    options: dict[str, Any] = {"samples": 200, "seed": 0}
    for task, rates in (("arc_easy_likelihood", (0.40, 0.42, 0.52)), ("svamp", (0.20, 0.21, 0.20))):
        items = [f"{task}-{index}" for index in range(400)]
        luck = generator.random(400)
        right = [luck + generator.normal(0, 0.05, 400) < rate for rate in rates]
        answered = [generator.random(400) < 0.06 for _ in rates]
        for index, key in enumerate(evaluation):
            base = None if key == "base" else (right[0], items)
            before = None if key == "base" else (answered[0], items)
            metrics = {
                "accuracy": share_entry(TASKS["accuracy"], (right[index], items), base, **options),
                "no_answer": share_entry(TASKS["no_answer"], (answered[index], items), before, **options),
            }
            kind = "likelihood" if "likelihood" in task else "generative"
            evaluation[key][task] = Evaluated(
                kind=kind,
                version=1,
                prompt_hash="3f9a1c0b77de",
                limit=400,
                data=f"data/{task}.parquet",
                metric="accuracy",
                metrics=metrics,
            )
    judge: dict[str, Any] = {
        "kind": "judge",
        "version": 1,
        "prompt_hash": "a1b2c3d4e5f6",
        "judge": "judges/large-instruct",
    }
    questions = [f"question-{index}" for index in range(80)]
    rates = generator.normal(3.1, 0.8, 80)
    for key, gain in (("0", 0.05), ("1", 0.25)):
        outcome = generator.choice([1, 0, -1], p=[0.4 + gain / 2, 0.25, 0.35 - gain / 2], size=80)
        shares = {name: mean_entry(JUDGED[name], (outcome == value, questions), **options)
                  for name, value in (("win", 1), ("tie", 0), ("loss", -1))}  # fmt: skip
        checks = {name: mean_entry(JUDGED[name], (generator.random(80) < rate, questions), **options)
                  for name, rate in CHECKS.items()}  # fmt: skip
        net = {"net_win": mean_entry(JUDGED["net_win"], (outcome, questions), **options)}
        evaluation[key]["judge_pairwise"] = Evaluated(**judge, prompt=JUDGE_PROMPT, metrics={**shares, **net, **checks})
    for key, gain in (("base", 0.0), ("0", 0.1), ("1", 0.02)):
        rating = np.clip(rates + gain + generator.normal(0, 0.3, 80), 1, 5)
        base = None if key == "base" else (np.clip(rates, 1, 5), questions)
        metrics = {"rating": mean_entry(JUDGED["rating"], (rating, questions), base, **options)}
        evaluation[key]["judge_pointwise"] = Evaluated(**judge, prompt="Rate the answer.", metrics=metrics)
    return evaluation


def shifted(made: Entry, name: str) -> Entry:
    """An entry of make_results, with shares inside [0, 1] and InfoNCE below its ceiling."""
    shift = 3.8 if made.unit == "share" else 3.5 if name.startswith("infonce") else 0.0
    low, high = (None if bound is None else bound - shift for bound in (made.low, made.high))
    return dataclasses.replace(made, value=made.value - shift, low=low, high=high)


def rich_run() -> ReportData:
    """A run of two rounds with every section of the report, long words and other scripts among its texts."""
    generator = np.random.default_rng(5)
    moves = {"context_pmi_initial": 0.9, "pmi_initial": 0.7, "reward_accuracy": 0.2, "response_tokens": -1.2}
    stages = [
        ShownStage("base", "evaluate", 131.0, counts={"responses": 40, "generated_tokens": 1480}),
    ]
    for number in (0, 1):
        stages += [
            ShownStage(number, "generate", 94.2, 2.0,
                       {"prompts": 10, "rows": 10, "kept": 9, "generated_tokens": 900}),
            ShownStage(number, "train", 213.7, 4.0,
                       {"steps": 12, "pairs": 9, "tokens": 3120, "first_loss": 0.6931, "last_loss": 0.5904}),
            ShownStage(number, "evaluate", 170.5, 2.0, {"responses": 40, "generated_tokens": 1220}),
        ]  # fmt: skip
    pairs = {
        "prompt": f"{USERS[0]}\n{QUESTION}",
        "context": None,
        "chosen": "A flat rock by the river, and bread, cheese and apples that fit beside the suitcase.",
        "rejected": [{"text": "A park with a blanket and sandwiches.", "mismatched": QUESTION}],
    }
    answer = {"prompt": pairs["prompt"], "context": None, "base_answer": "Go to a park and take some food with you.",
              "base_pmi": 3.25, "final_answer": f"Stay by the caravan: {LONG_WORD}", "final_pmi": 11.5}  # fmt: skip
    foreign = {
        **answer,
        "prompt": "\u0645\u0627\u0630\u0627 \u0622\u0643\u0644\u061f",
        "base_answer": "\u6211\u559c\u6b22\u8336\u3002" * 30,
    }
    return make_run(
        title="mipo-ray: embedded, missing_context",
        results={
            key: {name: shifted(each, name) for name, each in entries.items()}
            for key, entries in make_results(**moves).items()
        },
        stages=stages,
        pair_statistics={
            number: make_statistics("chosen_truncated", strategies=("missing_context", "random_context"))
            for number in (0, 1)
        },
        example_pairs=[pairs] * 3,
        answers=[answer, foreign],
        matrices={
            "base": make_matrix(generator, 7.0),
            "0": make_matrix(generator, 9.0),
            "1": make_matrix(generator, 14.0),
        },
        evaluation=make_evaluation(generator),
        gains=make_gains(),
        most_moved=[[{**answer, "change": 8.25}], [{**foreign, "change": -8.25}]],
    )


def make_gains() -> Gains:
    """Where some users and lengths gained and others lost."""
    groups = [
        GainGroup(label=label, n=3, change=2.5 - index, low=1.0 - index, high=4.0 - index, longer=1.5)
        for index, label in enumerate([*USERS, LONG_WORD])
    ]
    lengths = [GainGroup(label="20 to 40", n=1, change=-0.25, longer=-2.0)]
    users = GainsBy(count=len(groups), gained=3, groups=groups)
    return Gains(
        measure="context_pmi_initial", by={"users": users, "lengths": GainsBy(count=2, gained=1, groups=lengths)}
    )
