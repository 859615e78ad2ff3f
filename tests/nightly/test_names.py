"""Runs of any name: killed while it samples, gone on with, reported, with the same figures as one of a plain name.

python -m pytest tests/nightly/test_names.py

tests/unit/test_paths.py has many more names, part by part, and the golden run of the integration tests has one of all
kinds at once.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.runs import arguments, events, finish, kill_when, read_pairs, start, write_prompts

PROMPTS = 24
# Several kinds at once: a run takes a minute. tests/unit has each by itself.
NAMES = [
    "100% %41/#1/übung 实验 two words",
    'all*/it\'s "so"/exp [1]',
    "context=none/prompt_id=9/sample=9/key=x/judgement_id=y",
    "_hidden/.run/a::b/back\\slash $HOME ~",
    "x" * 200,
]


def finished(name: str, address: str, model: Path, place: Path) -> Path:
    """A run of one round without contexts, killed while it samples and gone on with by the same command."""
    place.mkdir(parents=True)
    (place / "recipe.yaml").write_text("{}")
    for part, count in (("train", PROMPTS), ("held_out", 6)):
        write_prompts(place / f"{part}.jsonl", part, count)
        rows = [json.loads(line) for line in (place / f"{part}.jsonl").read_text().splitlines()]
        text = "".join(json.dumps({**row, "context": ""}) + "\n" for row in rows)
        (place / f"{part}.jsonl").write_text(text)
    run_dir = place / "runs" / name
    options = arguments(
        run_dir, model, place, "rounds=1", "conditioning.strategy=random_prompt", "trackers=[tensorboard]"
    )
    generate = run_dir / "rounds/000/generate"
    kill_when(start(address, *options), lambda: any((generate / "checkpoint").glob("*[0-9].parquet")))
    assert not (generate / "manifest.json").exists()
    output = finish(start(address, *options))
    assert "base     evaluate  finished before\n" in output
    assert "finished before, nothing to do\n" in finish(start(address, *options))
    return run_dir


@pytest.fixture(scope="module")
def plain(ray_address: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished("plain", ray_address, tiny_model, tmp_path_factory.mktemp("names") / "plain")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_any_name_is_the_same_run(
    name: str, plain: Path, ray_address: str, tiny_model: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = finished(name, ray_address, tiny_model, tmp_path / "place")
    before, after = (json.loads((place / "results.json").read_text())["base"] for place in (plain, run_dir))
    assert {key: entry["value"] for key, entry in after.items()} == pytest.approx(
        {key: entry["value"] for key, entry in before.items()}, nan_ok=True
    )
    pairs, others = (read_pairs(place, 0) for place in (plain, run_dir))
    ids = [sorted(pair["pair_id"] for pair in each) for each in (pairs, others)]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == len(ids[0]) == PROMPTS
    assert {pair["context"] for pair in others} == {""}
    losses = [event["loss"] for event in events(run_dir) if event["event"] == "train_step"]
    found = EventAccumulator(str(run_dir / "trackers/tensorboard"))
    found.Reload()
    assert len(found.Scalars("train/train_step/loss")) == len(losses) > 0
    assert (run_dir / "report.html").stat().st_size > 10_000
