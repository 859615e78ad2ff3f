"""What a recipe and a run's configuration may do by themselves, and for what the user's own word is asked.

python -m pytest tests/unit/config/test_trust.py
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mipo_ray import compare, evaluate
from mipo_ray.comparison.definition import load_comparison
from mipo_ray.config.recipe import load_config, load_run_config
from mipo_ray.config.trust import _CHOICES, TrustError, describe_acts
from mipo_ray.run import main

ENGINES = "generation.pool.engine_args"
# Every engine argument of vLLM that is, or has in it, the name of a class, a module, a plug-in or a file.
IMPORTING = {
    "worker_cls": "mine.Worker",
    "worker_extension_cls": "mine.Worker",
    "scheduler_cls": "mine.Scheduler",
    "logits_processors": ["mine:Processor"],
    "distributed_executor_backend": "mine.Executor",
    "compilation_config": {"backend": "mine.compile"},
    "kv_transfer_config": {"kv_connector": "Mine", "kv_connector_module_path": "mine"},
    "ec_transfer_config": {"ec_connector_module_path": "mine"},
    "ec_manager_config": {"encoder_cache_manager_cls": "mine.Manager"},
    "kv_events_config": {"endpoint": "tcp://*:5557"},
    "model_class_overrides": {"LlamaForCausalLM": "mine:Model"},
    "reasoning_parser_plugin": "mine.py",
    "io_processor_plugin": "mine",
    "speculative_config": {"model": "mine"},
    "spec_model": "mine",
    "additional_config": {"module": "mine"},
    "profiler_config": {"torch_profiler_dir": "elsewhere"},
    "weight_transfer_config": {"backend": "mine"},
    "model_loader_extra_config": {"tensorizer_uri": "mine"},
    "default_mm_loras": {"image": "mine"},
    "download_dir": "elsewhere",
    "allowed_local_media_path": "/",
    "otlp_traces_endpoint": "http://elsewhere",
    "mm_encoder_fp8_scale_save_path": "elsewhere",
}
DEEPSPEED = [
    ({"csv_monitor": {"enabled": True, "output_path": "/elsewhere"}}, "csv_monitor"),
    ({"tensorboard": {"enabled": True}}, "tensorboard"),
    ({"wandb": {"enabled": True}}, "wandb"),
    ({"comet": {"enabled": True}}, "comet"),
    ({"flops_profiler": {"enabled": True, "output_file": "/elsewhere"}}, "flops_profiler"),
    ({"autotuning": {"enabled": True, "results_dir": "/elsewhere"}}, "autotuning"),
    ({"nebula": {"persistent_storage_path": "/elsewhere"}}, "nebula"),
    ({"zero_optimization": {"offload_optimizer": {"nvme_path": "elsewhere"}}}, "offload_optimizer.nvme_path"),
    ({"zero_optimization": {"leaf_module": {"classes": ["mine.Block"]}}}, "zero_optimization.leaf_module.classes"),
    ({"torch_autocast": {"lower_precision_safe_modules": ["os.system"]}}, "torch_autocast.lower_precision"),
]


def recipe_of(directory: Path, values: dict[str, Any]) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


def refused(recipe: Path, overrides: Sequence[str] = ()) -> str:
    with pytest.raises(TrustError) as error:
        load_config(recipe, overrides)
    return str(error.value)


@pytest.mark.parametrize("section", [ENGINES, "evaluate.judge.engine_args"])
@pytest.mark.parametrize("name", IMPORTING)
def test_engine_arguments_that_import_or_name_files_need_a_word(tmp_path: Path, section: str, name: str) -> None:
    recipe = recipe_of(tmp_path, nested(f"{section}.{name}", IMPORTING[name]))
    message = refused(recipe)
    assert message.startswith(f"{recipe}: asks for more than a recipe may do by itself")
    assert f"  {section}.{name}: may import code" in message
    assert "--trust-recipe" in message
    load_config(recipe, trusts_recipe=True)
    load_config(recipe, [f"{section}.{name}=mine.too"])
    refused(recipe, [f"{section}.max_num_seqs=4"])


def test_the_arguments_of_the_installed_vllm_are_known() -> None:
    source = Path(str(importlib.util.find_spec("vllm").submodule_search_locations[0])) / "engine" / "arg_utils.py"
    (arguments,) = (
        node
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
    )
    names = {node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign)}
    assert len(names) > 100
    assert names >= _CHOICES
    assert names >= IMPORTING.keys()
    assert [name for name in names if name.endswith(("_cls", "_plugin", "_processors")) and name not in IMPORTING] == []


def test_harmless_engine_arguments_need_none(tmp_path: Path) -> None:
    arguments = {
        "max_num_seqs": 64,
        "gpu_memory_utilization": 0.9,
        "enforce_eager": True,
        "cudagraph_capture_sizes": [1, 2, 4],
        "kv_cache_dtype": "fp8_e5m2",
        "distributed_executor_backend": "mp",
    }
    assert load_config(recipe_of(tmp_path, nested(ENGINES, arguments))).generation.pool.engine_args == arguments


@pytest.mark.parametrize(("values", "where"), DEEPSPEED, ids=[where for _, where in DEEPSPEED])
def test_deepspeed_keys_that_write_or_import_need_a_word(tmp_path: Path, values: dict[str, Any], where: str) -> None:
    recipe = recipe_of(tmp_path, {"train": {"deepspeed": values}})
    message = refused(recipe)
    assert "  train.deepspeed." in message
    assert where in message
    load_config(recipe, trusts_recipe=True)
    load_config(recipe, ["train.deepspeed={csv_monitor: {enabled: true}}"])


def test_deepspeed_keys_that_compute_need_none(tmp_path: Path) -> None:
    values = {
        "zero_optimization": {"reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}},
        "communication_data_type": "fp32",
        "wall_clock_breakdown": True,
    }
    assert load_config(recipe_of(tmp_path, {"train": {"deepspeed": values}})).train.deepspeed == values


@pytest.mark.parametrize("section", ["model", "evaluate.judge"])
def test_code_of_a_model_needs_a_word(tmp_path: Path, section: str) -> None:
    recipe = recipe_of(tmp_path, nested(f"{section}.trust_remote_code", True))
    assert f"  {section}.trust_remote_code: runs Python code" in refused(recipe)
    load_config(recipe, [f"{section}.trust_remote_code=true"])
    load_config(recipe, trusts_recipe=True)


def test_a_cluster_of_others_needs_a_word(tmp_path: Path) -> None:
    assert "  ray.address: joins the cluster at" in refused(recipe_of(tmp_path, {"ray": {"address": "h:6379"}}))
    load_config(recipe_of(tmp_path, {"ray": {"address": "auto"}}))
    load_config(recipe_of(tmp_path, {}), ["ray.address=h:6379"])


def test_a_base_is_trusted_no_more_and_all_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(nested(f"{ENGINES}.worker_cls", "a.B")))
    message = refused(recipe_of(tmp_path, {"base": "base.yaml", "model": {"trust_remote_code": True}}))
    assert f"{ENGINES}.worker_cls" in message
    assert "model.trust_remote_code" in message


JUDGE = {"model": "gpt", "endpoint": "https://elsewhere.example/v1"}


@pytest.mark.parametrize(
    ("judge", "overrides", "allowed", "is_sent"),
    [
        ({"api_key_variable": "CLOUD_SECRET"}, [], "", False),
        ({}, [], "", False),  # the default variable, to the server of the recipe
        ({"api_key_variable": "CLOUD_SECRET"}, ["evaluate.judge.endpoint=https://mine.example/v1"], "", False),
        ({"api_key_variable": "CLOUD_SECRET"}, [], "OTHER, CLOUD_SECRETS", False),
        ({"api_key_variable": "CLOUD_SECRET"}, [], "CLOUD_SECRET@mine.example", False),
        ({"endpoint": "http://api.openai.com/v1"}, [], "", False),
        ({"endpoint": "https://api.openai.com.example/v1"}, [], "", False),
        ({"endpoint": "https://api.openai.com:8443/v1"}, [], "", False),
        ({"endpoint": "https://api.openai.com/v1"}, [], "", True),
        ({}, ["evaluate.judge.endpoint=https://mine.example/v1"], "", True),
        ({}, ["evaluate.judge.api_key_variable=CLOUD_SECRET"], "", True),
        ({"api_key_variable": "CLOUD_SECRET"}, [], "OTHER, CLOUD_SECRET", True),
        ({"api_key_variable": "CLOUD_SECRET"}, [], "CLOUD_SECRET@elsewhere.example", True),
        ({"api_key_variable": "NOT_SET_HERE"}, [], "", True),
    ],
)
def test_a_variable_is_sent_where_the_user_says_so(
    judge: dict[str, str],
    overrides: list[str],
    allowed: str,
    is_sent: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLOUD_SECRET", "of-the-cloud")
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-judge")
    monkeypatch.setenv("MIPO_RAY_ALLOWED_VARIABLES", allowed)
    recipe = recipe_of(tmp_path, {"evaluate": {"judge": {**JUDGE, **judge}}})
    load_config(recipe, overrides, trusts_recipe=True)
    if is_sent:
        load_config(recipe, overrides)
        return
    message = refused(recipe, overrides)
    assert f"sends ${judge.get('api_key_variable', 'OPENAI_API_KEY')} to http" in message
    assert "MIPO_RAY_ALLOWED_VARIABLES" in message
    assert "of-the" not in message


def test_the_plan_says_what_goes_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_SECRET", "of-the-cloud")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:pass-word-1@tracking.example")
    values = {
        "model": {"path": "org/model", "trust_remote_code": True},
        "evaluate": {"judge": {**JUDGE, "api_key_variable": "CLOUD_SECRET"}},
        "trackers": ["mlflow", "wandb"],
        "train": {"deepspeed": {"csv_monitor": {"enabled": True}}},
    }
    config = load_config(recipe_of(tmp_path, values), trusts_recipe=True)
    assert describe_acts(config) == [
        "trusted         model.trust_remote_code: runs Python code that comes with 'org/model'",
        "trusted         train.deepspeed.csv_monitor: may write files, send, or import code: {'enabled': True}",
        "sent            $CLOUD_SECRET, held-out prompts and answers to https://elsewhere.example/v1",
        "sent            numbers and the configuration to Weights & Biases",
        "sent            numbers and the configuration to https://(not shown)@tracking.example",
    ]
    assert describe_acts(load_config()) == []


def test_a_run_directory_hands_no_trust_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    text = yaml.safe_dump({"model": {"path": "org/model", "trust_remote_code": True}})
    (run / "config.yaml").write_text(text)
    arguments = ["--dry-run", str(run), "tasks=gsm8k"]
    assert evaluate.main(arguments) == 2
    message = capsys.readouterr().err
    assert f"{run}/config.yaml: asks for more than a recipe may do by itself" in message
    assert "model.trust_remote_code: runs Python code that comes with 'org/model'" in message
    # With the word, what is refused is something else.
    for word in ("--trust-recipe", "model.trust_remote_code=true"):
        assert evaluate.main([*arguments, word]) == 2
        assert "asks for more" not in capsys.readouterr().err
    with pytest.raises(TrustError):
        load_run_config(text, "config.yaml")


def test_a_run_that_is_resumed_needs_the_word_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path, {"run_dir": f"{tmp_path}/run", "model": {"trust_remote_code": True}})
    for _ in range(2):
        assert main(["--dry-run", str(recipe)]) == 2
        assert "model.trust_remote_code" in capsys.readouterr().err


def test_the_arms_of_a_comparison_need_a_word_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {"a": {}, "b": {"train": {"deepspeed": {"csv_monitor": {"output_path": "/elsewhere"}}}}}
    recipe = recipe_of(tmp_path, {"run_dir": f"{tmp_path}/run", "arms": arms})
    assert compare.main(["--dry-run", str(recipe)]) == 2
    assert f"{recipe}, arms.b: asks for more" in capsys.readouterr().err
    with pytest.raises(TrustError):  # said of all arms, which this one overrides
        load_comparison(recipe, ["train.deepspeed={steps_per_print: 1}"])
    load_comparison(recipe, ["arms.b.train.deepspeed={csv_monitor: {enabled: true}}"])
    load_comparison(recipe, trusts_recipe=True)
    shared = recipe_of(tmp_path, {"arms": {"a": {}, "b": {}}, "model": {"trust_remote_code": True}})
    with pytest.raises(TrustError, match=r"recipe\.yaml: asks for more"):
        load_comparison(shared)
    load_comparison(shared, ["model.trust_remote_code=true"])
