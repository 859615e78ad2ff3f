"""Paths of any name: opened as they are written, and linked to where a program would take them for a pattern.

python -m pytest tests/unit/test_paths.py
"""

from __future__ import annotations

import glob
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mipo_ray.config.prompts import ChatSettings
from mipo_ray.config.recipe import load_config, to_yaml
from mipo_ray.config.schema import Config
from mipo_ray.generation.vllm_arguments import EngineSettings, engine_arguments
from mipo_ray.monitoring.events import EventWriter, read_events
from mipo_ray.monitoring.metrics import ascii_label
from mipo_ray.paths import open_path, plain_path
from mipo_ray.report.run_report import write_report
from mipo_ray.storage.configuration import record_config
from mipo_ray.storage.run_directory import open_run

# Of every script, and whatever a shell, a URL, a pattern, a query or a page would read otherwise.
NAMES = [
    "plain",
    "two words",
    " led and trailed ",
    "übung",
    "实验一",
    "תרגיל",
    "e\u0301te\u0301",
    "🙂",
    "100%",
    "%41%2F",
    "#1",
    "a#b",
    "[1]",
    "exp [a-z]",
    "all*",
    "!x",
    "it's",
    '"so"',
    "<x-tag>&amp;",
    "a=b",
    "context=none",
    "a::b",
    "http:",
    "a;b,c",
    "$HOME",
    "{x}",
    "back\\slash",
    "-rf",
    "_hidden",
    ".hidden",
    "x" * 255,
    "ü" * 127,
]
EVENT = {"round": 0, "stage": "train", "event": "train_step", "step": 0, "loss": 0.5, "pairs": 3}
SETTINGS = EngineSettings("model", "float32", 64, False, 1, False, {}, ChatSettings({}))


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_opened_as_it_is_written(tmp_path: Path, name: str) -> None:
    filesystem, path = open_path(str(tmp_path / name))
    filesystem.makedirs(path)
    assert os.listdir(tmp_path) == [name]
    assert open_path("memory://a/b#c")[1] == "/a/b#c"


@pytest.mark.parametrize("name", NAMES)
def test_a_pattern_below_a_plain_path_finds_what_is_there(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    (directory / "model.safetensors").write_text("x")
    linked = plain_path(str(directory))
    assert [Path(found).read_text() for found in glob.glob(os.path.join(linked, "*.safetensors"))] == ["x"]
    assert (linked == str(directory)) == (not glob.has_magic(name))


def test_links_go_when_the_process_ends(tmp_path: Path) -> None:
    code = "import sys; from mipo_ray.paths import plain_path; print(plain_path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "[1]")], capture_output=True, text=True, check=True
    )
    assert not os.path.lexists(done.stdout.strip())
    assert "mipo-ray-link-" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_is_given_a_path_and_a_label_that_it_can_use(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    arguments = engine_arguments(str(directory), SETTINGS)
    assert os.path.samefile(arguments["model"], directory)
    assert not glob.has_magic(arguments["model"])
    label = arguments.get("served_model_name", arguments["model"])
    assert label.isascii()
    assert label == ascii_label(str(directory))


def test_an_engine_of_a_plain_path_is_called_by_it() -> None:
    assert "served_model_name" not in engine_arguments("/runs/demo/policy", SETTINGS)
    assert engine_arguments("organisation/name", SETTINGS)["model"] == "organisation/name"


@pytest.mark.parametrize("name", NAMES)
def test_numbers_reach_metrics_trackers_and_report_of_a_run(tmp_path: Path, name: str) -> None:
    """With Ray's own metrics, which take labels in ASCII alone and raise for others."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = open_run(str(tmp_path / name))
    record_config(run, Config())
    writer = EventWriter(run)
    writer.open_trackers(["tensorboard"], {})
    for stage in ("train", "tasks/größe"):
        writer.emit({**EVENT, "stage": stage})
    writer.emit({"round": 0, "stage": "generate", "event": "dropped", "reason": "muster: ß", "dropped_pairs": 2})
    writer.close(True)
    assert [event["stage"] for event in read_events(run)] == ["train", "tasks/größe", "generate"]
    found = EventAccumulator(run.path("trackers/tensorboard"))
    found.Reload()
    assert [scalar.value for scalar in found.Scalars("train/train_step/loss")] == [0.5]
    write_report(Config(), run)
    assert "<x-tag>" not in (Path(run.root) / "report.html").read_text(encoding="utf-8")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_name_that_the_terminal_cannot_show_ends_no_command(tmp_path: Path, encoding: str) -> None:
    run = open_run(str(tmp_path / "实验 ü"))
    run.write_text("config.yaml", to_yaml(load_config()))
    code = (
        "import sys; from mipo_ray.command import run_command\n"
        "sys.exit(run_command(lambda: print(sys.argv[1]) or 0, resumes=False))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, run.url], capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).startswith(str(tmp_path))


@pytest.mark.parametrize(("text", "label"), [("plain a=b#%", "plain a=b#%"), ("ü中", "%C3%BC%E4%B8%AD"), ("", "")])
def test_labels_are_ascii(text: str, label: Any) -> None:
    assert ascii_label(text) == label
    json.dumps(label).encode("ascii")
