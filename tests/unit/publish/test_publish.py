"""Publishing a run's model: the folder, what must not stand in it, and the way to a stand-in of the Hub.

python -m pytest tests/unit/publish/test_publish.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import yaml

from mipo_ray.config.recipe import load_config, load_run_config
from mipo_ray.errors import UserError
from mipo_ray.publish.__main__ import main
from mipo_ray.publish.model_card import lora_rank_of_vllm
from mipo_ray.publish.policy import find_policy
from mipo_ray.storage.entries import Entry, Evaluated
from mipo_ray.storage.records import to_text
from mipo_ray.storage.results import write_evaluation, write_results
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory, open_run
from tests.helpers.fake_hub_api import TOKEN, FakeHubApi, FakeRepository
from tests.helpers.guard_figures import broken_bound
from tests.helpers.paired_runs import make_pair, make_run
from tests.helpers.report_data import rich_run
from tests.helpers.stages import commit, edit_manifest

NAME = "ada/tea-model"
SECRET = "sk-ThisIsTheKeyOfAJudge1234567890"
FILES = {
    "chat_template.jinja": "{{ messages }}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"eos_token": "<end>"}',
    "generation_config.json": "{}",
}


def finish_round(run: RunDirectory, number: int, options: list[str]) -> None:
    """A trained and measured policy: its files, and what its stages say of it."""
    config = load_config(None, options)
    policy = Path(run.path(f"rounds/{number:03d}/train/policy"))
    policy.mkdir(parents=True)
    for name, text in FILES.items():
        (policy / name).write_text(text)
    (policy / "config.json").write_text(json.dumps({"_name_or_path": f"{run.root}/elsewhere", "model_type": "llama"}))
    (policy / "model.safetensors").write_bytes(f"weights of round {number}".encode() * 1000)
    commit(run, f"rounds/{number:03d}/train", config, reference=f"{run.root}/base")
    figure = Entry(0.9, 0.8, 1.0, 20, "share", change=0.4, change_low=0.3, change_high=0.5)
    commit(run, f"rounds/{number:03d}/evaluate", config, results={"reward_accuracy": figure}, policy=run.root)
    accuracy = Entry(0.61, 0.55, 0.67, 500, "share", change=0.01, change_low=-0.02, change_high=0.04)
    task = Evaluated(kind="generative", data="own-data/items.json", metric="accuracy", metrics={"accuracy": accuracy})
    commit(run, f"rounds/{number:03d}/tasks/gsm8k", config, name="gsm8k", evaluation=task)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run of two rounds on a machine with places and a key that nobody else needs to know."""
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "secret-project"
    places = [f"model.path={place}/model", f"prompts.path={place}/people.jsonl", f"prompts.system=See {place}/x."]
    places.append(f"prompts.template_arguments={{notes: {place}/notes.txt}}")
    options = [f"run_dir={place}/run", "rounds=2", *places]
    run = make_run(place / "run", [[make_pair(1)], [make_pair(2), make_pair(3, dropped="identical")]], *options)
    commit(
        run, "base/evaluate", load_config(None, options), results={"reward_accuracy": Entry(0.5, 0.5, 0.5, 20, "share")}
    )
    for number in (0, 1):
        finish_round(run, number, options)
    write_results(run, 2)
    write_evaluation(run)
    return run


@pytest.fixture
def hub() -> Iterator[FakeHubApi]:
    with FakeHubApi().running() as hub:
        yield hub


def dry_run(run: RunDirectory, folder: Path, *options: str) -> dict[str, bytes]:
    """The files of a dry run: name -> content."""
    assert main([run.url, "--to", NAME, "--dry-run", "--output", str(folder), *options]) == 0
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def publish(hub: FakeHubApi, run: RunDirectory, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it, with the stand-in for the Hub."""
    return subprocess.run(
        [sys.executable, "-m", "mipo_ray.publish", run.url, "--to", NAME, *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **hub.environment(), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_folder_is_a_model_with_its_card(run: RunDirectory, tmp_path: Path) -> None:
    files = dry_run(run, tmp_path / "out")
    assert files.keys() == {*FILES, "config.json", "model.safetensors", "README.md"}
    assert files["model.safetensors"].startswith(b"weights of round 1")
    assert files["chat_template.jinja"].decode() == FILES["chat_template.jinja"]
    _, head, card = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    assert "| `reward_accuracy`, reward accuracy, share | 20 | 0.500 | 0.900 [0.800, 1.000] |" in card
    assert "+0.400 [+0.300, +0.500] | rose |" in card
    assert "`gsm8k.accuracy`" in card
    assert "| 1 | 1 of 2 | 1 | 40 | 0.6931 | 0.6000 |" in card
    assert f'AutoModelForCausalLM.from_pretrained("{NAME}")' in card
    assert "no notion of truth" in card
    assert "torch" in card.split("## Versions")[1]


def test_a_policy_that_was_found_bad_is_published_where_it_is_named_alone(run: RunDirectory, tmp_path: Path) -> None:
    config = load_run_config(str(run.read_text("config.yaml")), "config.yaml")
    commit(run, "rounds/001/guard", config, broken=[broken_bound()])
    assert find_policy(run).round == Round(0)
    assert dry_run(run, tmp_path / "good")["model.safetensors"].startswith(b"weights of round 0")
    assert list(find_policy(run, 1).trained) == [Round(0), Round(1)]
    # Round 1 comes from the initial model where round 0 is the bad one.
    run.remove("rounds/001/guard")
    commit(run, "rounds/000/guard", config, broken=[broken_bound()])
    assert list(find_policy(run).trained) == [Round(1)]
    commit(run, "rounds/001/guard", config, broken=[broken_bound()])
    with pytest.raises(UserError, match=r"expected a round that is trained, found these: 0 \(found bad: name it\), 1 "):
        find_policy(run)


def test_a_policy_of_pairs_that_existed_is_not_called_one_of_its_own_answers(tmp_path: Path) -> None:
    own = ["pairs.path=hf://datasets/org/name/a.jsonl", "evaluate.enabled=false", "rounds=1"]
    run = make_run(tmp_path / "run", [[make_pair(1, strategy="given")]], *own)
    finish_round(run, 0, [f"run_dir={run.root}", *own])
    card = dry_run(run, tmp_path / "out")["README.md"].decode()
    assert (
        "by preference optimisation (`dpo`) with mipo-ray, on preference pairs that existed: hf://datasets/org" in card
    )
    assert "Pairs: hf://datasets/org/name/a.jsonl. It was trained by `dpo`" in card
    assert "with the faults that those choices have" in card
    for wrong in ("MIPO", "of its own answers", "mismatched", "no labels", "mipo\n"):
        assert wrong not in card


def test_the_card_has_every_measure_of_tasks_and_judges(run: RunDirectory, tmp_path: Path) -> None:
    evaluation = rich_run().evaluation
    run.write_text("evaluation.json", to_text(evaluation))
    card = dry_run(run, tmp_path / "out")["README.md"].decode()
    names = {f"{task}.{metric}" for task, found in evaluation["1"].items() for metric in found.metrics}
    assert {"judge_pairwise.net_win", "judge_pointwise.rating", "svamp.accuracy"} <= names
    assert [name for name in names if f"| `{name}`, " not in card] == []


def test_nothing_of_this_machine_is_told(run: RunDirectory, tmp_path: Path) -> None:
    """Neither paths nor keys: in the cards, in what transformers notes, in the results of tasks. Rows of pairs are
    data, as the user's prompts and variables have it."""
    files = dry_run(run, tmp_path / "out", "--pairs", "--results")
    assert "pairs/round_1.jsonl" in files
    assert "results/evaluation.json" in files
    told = {name: content for name, content in files.items() if not name.endswith(".jsonl")}
    for name, content in told.items():
        for private in ("secret-project", "own-data", str(tmp_path), SECRET):
            assert private not in content.decode(), name
    assert json.loads(files["config.json"]) == {"model_type": "llama"}
    assert json.loads(files["results/results.json"])["1"]["reward_accuracy"]["value"] == 0.9
    assert "base_model" not in files["README.md"].decode()  # nobody could load it by a name


def test_a_run_on_an_object_store_is_published_as_one_on_a_disk(run: RunDirectory, tmp_path: Path) -> None:
    """Its files are fetched through fsspec, pairs among them."""
    store = fsspec.filesystem("memory")
    store.put(run.root, "/bucket/run", recursive=True)
    try:
        remote = dry_run(open_run("memory://bucket/run"), tmp_path / "remote", "--pairs", "--results")
    finally:
        store.rm("/bucket", recursive=True)
    assert remote == dry_run(run, tmp_path / "local", "--pairs", "--results")


def test_only_what_the_run_wrote_is_published(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a file that somebody left there, nor what a link leads to."""
    policy = Path(run.path("rounds/001/train/policy"))
    (policy / "notes.txt").write_text("mine")
    assert "notes.txt" not in dry_run(run, tmp_path / "out")
    outside = tmp_path / "key"
    (policy / "tokenizer.json").rename(outside)
    (policy / "tokenizer.json").symlink_to(outside)
    assert main([run.url, "--to", NAME, "--dry-run", "--output", str(tmp_path / "linked")]) == 2
    assert "tokenizer.json: expected a file that the run wrote, found a link" in capsys.readouterr().err
    assert not (tmp_path / "linked/tokenizer.json").exists()


def test_an_earlier_round_can_be_published(run: RunDirectory, tmp_path: Path) -> None:
    files = dry_run(run, tmp_path / "out", "--round", "0", "--pairs")
    assert files["model.safetensors"].startswith(b"weights of round 0")
    assert "pairs/round_1.jsonl" not in files
    assert "by 1 round of MIPO" in files["README.md"].decode()


def test_a_model_of_the_hub_is_named_as_base(run: RunDirectory, tmp_path: Path) -> None:
    """Where the run noted the commit that it sampled from, and only there."""
    manifest = Path(run.path("rounds/000/generate/manifest.json"))
    edit_manifest(manifest, lambda facts: facts.update(policy_commit=40 * "a"))
    config = Path(run.path("config.yaml"))
    values = yaml.safe_load(config.read_text())
    values["model"]["path"] = "qwen/small"
    config.write_text(yaml.safe_dump(values))
    head = dry_run(run, tmp_path / "out")["README.md"].decode().split("---\n")[1]
    assert yaml.safe_load(head)["base_model"] == "qwen/small"


def test_an_upload_is_private_and_is_the_folder_of_the_dry_run(
    run: RunDirectory, hub: FakeHubApi, tmp_path: Path
) -> None:
    done = publish(hub, run, "--upload", "--pairs")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories[NAME]
    assert repository.private
    assert repository.files == dry_run(run, tmp_path / "out", "--pairs")
    assert len(repository.commits) == 1
    assert f"{hub.url}/{NAME}: " in done.stdout
    assert "private" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert hub.url not in repository.files["README.md"].decode()


def test_a_public_repository_needs_the_word(run: RunDirectory, hub: FakeHubApi) -> None:
    """One that is there already, for everybody to see, gets nothing without --public."""
    hub.repositories[NAME] = FakeRepository(private=False)
    done = publish(hub, run, "--upload")
    assert done.returncode == 2
    assert "everybody can see it; give --public" in done.stderr
    assert hub.repositories[NAME].files == {}
    assert publish(hub, run, "--upload", "--public").returncode == 0
    assert "README.md" in hub.repositories[NAME].files


def test_what_the_hub_refuses_is_one_line(run: RunDirectory, hub: FakeHubApi) -> None:
    done = publish(hub, run, "--upload", HF_TOKEN="hf_" + "somebodyelseswithoutrights")
    assert done.returncode == 2
    assert f"error: {NAME}: not published: " in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--to", "tea-model", "--dry-run"], "--to tea-model: expected a name of the Hub, ORG/NAME"),
        (["--to", NAME, "--dry-run", "--public"], "--public: says how --upload makes the repository"),
        (["--to", NAME, "--upload", "--output", "here"], "--output: says where --dry-run writes"),
        (["--to", NAME, "--dry-run", "--round", "7"], "expected round 7 to be trained, found these: 0, 1"),
        (["--to", NAME, "--dry-run", "--adapter"], "this run trained whole weights (train.lora.rank=0)"),
    ],
)
def test_wrong_words_are_refused(
    run: RunDirectory, options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([run.url, *options]) == 2
    assert expected in capsys.readouterr().err


def test_nothing_is_sent_without_the_word(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([run.url, "--to", NAME])
    assert "one of the arguments --dry-run --upload is required" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "taken"), [(2, 8), (8, 8), (48, 64), (512, 512)])
def test_vllm_takes_the_rank_that_the_card_names(rank: int, taken: int) -> None:
    assert lora_rank_of_vllm(rank) == taken
