"""The forms in which other trainers take preference pairs: their columns, as their documentation names them.

Each is a pure function from a pair to a row. What a tool's own columns have no place for stays behind: the sampled
token ids, the log-probs and the mismatched prompts are in the format `parquet` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mipo_ray.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class TextPair:
    """A pair as texts: the prompt's messages (role, content), and one response of each side.

    template_arguments: variables that the run's chat template was given beside the messages.
    """

    pair_id: str
    messages: list[dict[str, str]]
    chosen: str
    rejected: str
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A form of pairs.

    row: None for the run's own Parquet files, which are copied as they are.
    columns: name -> what it holds, for people. source: where the tool documents them. usage: how the tool is given the
    file {file} of the directory, in its own words.
    """

    tool: str
    row: Callable[[TextPair], Row] | None
    columns: dict[str, str]
    source: str
    usage: str

    @property
    def suffix(self) -> str:
        return "parquet" if self.row is None else "jsonl"


def _turn(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def _trl(pair: TextPair) -> Row:
    row: Row = {"prompt": pair.messages, "chosen": [_turn(pair.chosen)], "rejected": [_turn(pair.rejected)]}
    # TRL's DPOTrainer hands this column to the chat template (tokenize_fn in trl/trainer/dpo_trainer.py, 1.16).
    return row | ({"chat_template_kwargs": dict(pair.template_arguments)} if pair.template_arguments else {})


def _openrlhf(pair: TextPair) -> Row:
    return {"prompt": pair.messages, "chosen": [_turn(pair.chosen)], "rejected": [_turn(pair.rejected)]}


def _axolotl(pair: TextPair) -> Row:
    return {"messages": pair.messages, "chosen": _turn(pair.chosen), "rejected": _turn(pair.rejected)}


# Its names of roles.
_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


def _llama_factory(pair: TextPair) -> Row:
    turns = [message["role"] for message in pair.messages if message["role"] != "system"]
    in_turn = ["user" if number % 2 == 0 else "assistant" for number in range(len(turns))]
    is_first = all(message["role"] != "system" for message in pair.messages[1:])
    if turns != in_turn or not is_first or len(turns) % 2 == 0:
        roles = ", ".join(message["role"] for message in pair.messages)
        # It would leave such a row out with a line in its log (aligned_messages in src/llamafactory/data/converter.py).
        raise UserError(
            f"pair {pair.pair_id}: llama-factory takes prompts of user and assistant in turn behind at most one system "
            f"message, ending with the user; found {roles}; choose another format"
        )
    conversations = [{"from": _SHAREGPT[message["role"]], "value": message["content"]} for message in pair.messages]
    chosen, rejected = ({"from": _SHAREGPT["assistant"], "value": text} for text in (pair.chosen, pair.rejected))
    return {"conversations": conversations, "chosen": chosen, "rejected": rejected}


def _ms_swift(pair: TextPair) -> Row:
    return {"messages": [*pair.messages, _turn(pair.chosen)], "rejected_response": pair.rejected}


_MESSAGES = "the prompt: a list of {role, content}"
_ANSWERS = {"chosen": "the chosen response: a list of one message", "rejected": "the rejected one, likewise"}

FORMATS: dict[str, Format] = {
    "trl": Format(
        "TRL",
        _trl,
        {
            "prompt": _MESSAGES,
            **_ANSWERS,
            "chat_template_kwargs": "variables that the chat template is given beside the messages",
        },
        "https://huggingface.co/docs/trl/dataset_formats#preference",
        'trl.DPOTrainer(train_dataset=datasets.load_dataset("json", data_files="{file}", split="train"), ...)',
    ),
    "openrlhf": Format(
        "OpenRLHF",
        _openrlhf,
        {"prompt": _MESSAGES, **_ANSWERS},
        "https://github.com/OpenRLHF/OpenRLHF/blob/main/openrlhf/datasets/reward_dataset.py",
        "python -m openrlhf.cli.train_dpo --dataset {file} --apply_chat_template --prompt_key prompt "
        "--chosen_key chosen --rejected_key rejected",
    ),
    "axolotl": Format(
        "Axolotl",
        _axolotl,
        {
            "messages": _MESSAGES,
            "chosen": "the chosen response: a message {role, content}",
            "rejected": "the rejected one, likewise",
        },
        "https://docs.axolotl.ai/docs/rlhf.html#chat_template.default",
        "rl: dpo\ndatasets:\n  - ds_type: json\n    data_files: [{file}]\n    split: train\n"
        "    type: chat_template.default\n    field_messages: messages\n    field_chosen: chosen\n"
        "    field_rejected: rejected",
    ),
    "llama-factory": Format(
        "LLaMA-Factory",
        _llama_factory,
        {
            "conversations": "the prompt: a list of {from, value}",
            "chosen": "the chosen response: {from, value}",
            "rejected": "the rejected one, likewise",
        },
        "https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md",
        "stage: dpo\ndataset_dir: .\ndataset: {name}   # of dataset_info.json beside this card",
    ),
    "ms-swift": Format(
        "ms-swift",
        _ms_swift,
        {
            "messages": "the prompt and the chosen response as its last message: a list of {role, content}",
            "rejected_response": "the rejected response: text",
        },
        "https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html",
        "swift rlhf --rlhf_type dpo --dataset {file}",
    ),
    "parquet": Format(
        "mipo-ray",
        None,
        {"every column of the run's pairs": "docs/run-directory.md; `dropped` is empty in all of them"},
        "https://parquet.apache.org",
        'datasets.load_dataset("parquet", data_files="{file}", split="train")',
    ),
}


def dataset_info(files: Mapping[str, str]) -> dict[str, Any]:
    """LLaMA-Factory's dataset_info.json for files of its format: name of a data set -> file."""
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    return {
        name: {"file_name": file, "formatting": "sharegpt", "ranking": True, "columns": columns}
        for name, file in files.items()
    }
