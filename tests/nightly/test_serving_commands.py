"""The commands of docs/sharing.md and of model cards, read by vLLM's own argument parser. No engine is started.

python -m pytest tests/nightly/test_serving_commands.py
"""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mipo_ray.config.recipe import load_config
from mipo_ray.publish.model_card import render_card
from mipo_ray.publish.policy import Policy
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import open_run
from tests.helpers.stages import FACTS, GenerateFacts, TrainFacts

PAGE = Path(__file__).parents[2] / "docs" / "sharing.md"


@pytest.fixture(scope="module")
def parser() -> Any:
    """As `vllm serve` makes it."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def served(parser: Any, text: str) -> list[Any]:
    """What the parser makes of every `vllm serve` in the blocks of a Markdown text; a wrong word fails the test."""
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [parser.parse_args(shlex.split(line)[2:]) for line in lines if line.startswith("vllm serve ")]
    for options in found:
        validate_parsed_serve_args(options)
    return found


def test_the_pages_commands_are_vllms(parser: Any) -> None:
    policy, adapter = served(parser, PAGE.read_text())
    assert policy.model_tag == "runs/mine/rounds/001/train/policy"
    assert policy.served_model_name == ["mine"]
    assert policy.max_model_len == 1024
    for options in (policy, adapter):
        assert options.default_chat_template_kwargs == {"date_string": "26 Jul 2024"}
        assert options.chat_template is None  # the directory's own
    assert adapter.enable_lora
    assert adapter.max_lora_rank == 64
    (module,) = adapter.lora_modules
    assert (module.name, module.path) == ("mine", "published/ORG/NAME")


@pytest.mark.parametrize("rank", [None, 12], ids=["model", "adapter"])
def test_a_cards_command_is_vllms(parser: Any, tmp_path: Path, rank: int | None) -> None:
    """The rank that the card names is one that vLLM takes, and the template's variables arrive, quotes and all."""
    arguments = 'prompts.template_arguments={style: it\'s "short"}'
    config = load_config(None, ["model.path=qwen/small", arguments])
    generated: Any = replace(FACTS[GenerateFacts], policy_commit=40 * "a")
    trained: Any = FACTS[TrainFacts]
    policy = Policy(open_run(str(tmp_path)), config, Round(0), {Round(0): trained}, {Round(0): generated})
    (options,) = served(parser, render_card(policy, "ada/tea", adapter_rank=rank))
    assert options.default_chat_template_kwargs == config.prompts.template_arguments
    assert options.model_tag == ("ada/tea" if rank is None else "qwen/small")
    assert rank is None or options.max_lora_rank == 16
