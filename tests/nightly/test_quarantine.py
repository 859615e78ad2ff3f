"""A prompt of which real engines die is found and set aside, and the run goes on; so does one that is resumed.

python -m pytest tests/nightly/test_quarantine.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import deadly_prompts
from tests.helpers.engine_processes import wait_until_nothing_is_left
from tests.helpers.runs import events, has_traceback, read_pairs, run_command, write_prompts

ROWS = 16  # two blocks, which one engine has at the same time
DEADLY = "train-5"
# One while both blocks were with the engine, then alone its block of 8, a half with it, two rows with it, and it twice.
MOST_DEATHS = 6


def write_run(folder: Path) -> None:
    write_prompts(folder / "train.jsonl", "train", ROWS)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row in rows:
        if row["prompt_id"] == DEADLY:
            row["prompt"] += f" {deadly_prompts.DEADLY_TEXT}"
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "recipe.yaml").write_text("{}")


@pytest.mark.parametrize(
    ("lifetime", "fault"),
    [("stage", "KillsCore"), ("run", "KillsCore"), ("stage", "KillsActor"), ("run", "KillsActor")],
)
def test_a_prompt_of_which_engines_die_is_set_aside_and_a_resumed_run_does_not_look_for_it_again(
    ray_cluster: object, ray_address: str, tiny_model: Path, tmp_path: Path, lifetime: str, fault: str
) -> None:
    write_run(tmp_path)
    run_dir = tmp_path / "run"
    stage = run_dir / "rounds/000/generate"
    options = (
        f"{tmp_path}/recipe.yaml",
        f"run_dir={run_dir}",
        f"model.path={tiny_model}",
        "model.max_model_len=256",
        "rounds=1",
        f"prompts.path={tmp_path}/train.jsonl",
        "conditioning.strategy=missing_context",  # the prompt's own row alone is sampled under it
        "conditioning.block_size=8",
        "generation.sampling.max_tokens=8",
        "generation.sampling.temperature=1.0",
        f"generation.pool.lifetime={lifetime}",
        f"generation.pool.engine_args={{logits_processors: ['{deadly_prompts.__name__}:{fault}']}}",
        "filters.truncated=false",
        "evaluate.enabled=false",
        "train.learning_rate=1e-3",
    )
    code, output = run_command(ray_address, *options, "generation.max_quarantined_share=0")
    assert code == 2, output
    assert f"{stage}/quarantine.jsonl: rows of which engines died, each alone: 1, the newest '{DEADLY}'" in output
    assert not has_traceback(output), output
    deaths = [json.loads(line) for line in (stage / "deaths.jsonl").read_text().splitlines()]
    alone = [death["rows"] for death in deaths if death["alone"]]
    assert len(alone) <= MOST_DEATHS - 1, deaths
    assert alone[-2:] == [1, 1]
    assert alone == sorted(alone, reverse=True)

    code, output = run_command(ray_address, *options)
    assert code == 0, output
    assert [json.loads(line) for line in (stage / "deaths.jsonl").read_text().splitlines()] == deaths
    (line,) = [json.loads(line) for line in (stage / "quarantine.jsonl").read_text().splitlines()]
    assert (line["prompt_id"], line["step"], line["reason"]) == (DEADLY, "sample", deaths[-1]["error"])
    print(line["reason"])  # for whoever looks at what a death says
    pairs = {pair["prompt_id"]: pair for pair in read_pairs(run_dir, 0)}
    assert len(read_pairs(run_dir, 0)) == len(pairs) == ROWS
    assert {name for name, pair in pairs.items() if pair["dropped"] == "quarantined"} == {DEADLY}
    assert (pairs[DEADLY]["chosen"], pairs[DEADLY]["chosen_token_ids"]) == ("", [])
    assert all(pair["chosen_token_ids"] for name, pair in pairs.items() if name != DEADLY)
    manifest = json.loads((stage / "manifest.json").read_text())
    assert manifest["quarantined"] == manifest["statistics"]["dropped"]["quarantined"] == 1
    assert "prompts set aside because engines died of them: 1 (quarantine.jsonl)" in output
    assert [event["prompt_id"] for event in events(run_dir) if event["event"] == "quarantined"] == [DEADLY]
    assert "quarantined" in (run_dir / "report.html").read_text()
    wait_until_nothing_is_left()
