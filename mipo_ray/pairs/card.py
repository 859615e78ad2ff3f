"""The data card of exported pairs: what they are, how they were made, how other tools read them, what they are not."""

from __future__ import annotations

from pathlib import Path

import mipo_ray
from mipo_ray.config.public import public_file, public_model, public_settings, public_text
from mipo_ray.config.schema import Config
from mipo_ray.config.yaml_text import dump_yaml
from mipo_ray.pairs.export import CARD, Export
from mipo_ray.pairs.formats import FORMATS
from mipo_ray.storage.run_directory import RunDirectory

PAPER = "https://arxiv.org/abs/2603.19294"
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write_card(export: Export, run: RunDirectory, output: Path) -> None:
    """Writes the card beside the files."""
    text = public_text(render_card(export), [run.root, run.url])
    (output / CARD).write_text(text, encoding="utf-8")


def render_card(export: Export) -> str:
    """The card as Markdown, with the head that the Hugging Face Hub reads."""
    form = FORMATS[export.format]
    config = export.config
    head = {
        "task_categories": ["text-generation"],
        "tags": ["dpo", "preference", *(["mipo"] if config.is_mipo else []), "mipo-ray"],
        "size_categories": [_size(sum(each.rows for each in export.rounds))],
        "configs": [{"config_name": each.round.name, "data_files": each.file} for each in export.rounds],
    }
    first = export.rounds[0]
    return "\n".join(
        [
            f"---\n{dump_yaml(head)}---\n",
            *_origin(export),
            "## Rounds\n",
            "Each round's pairs were sampled from the policy that the round before it left.\n"
            if config.pairs.path is None
            else "",
            "| file | sampled from | pairs | rows | with a response cut at the length limit | dropped by filters |",
            "|---|---|---|---|---|---|",
            *_rounds(export),
            "",
            "## Columns\n",
            f"As [{form.tool} documents them]({form.source}).\n",
            "| column | what |",
            "|---|---|",
            *(f"| `{name}` | {what} |" for name, what in form.columns.items()),
            "",
            "## How to use them\n",
            f"```\n{form.usage.format(file=first.file, name=first.round.name)}\n```\n",
            *_limits(export),
            "## How they were made\n",
            f"mipo-ray {mipo_ray.__version__}, with these settings; all others are its defaults.\n",
            f"```yaml\n{dump_yaml(public_settings(config))}```\n",
            _sources(config),
            "",
        ]
    )


def _origin(export: Export) -> list[str]:
    """What these pairs are."""
    tool, config = FORMATS[export.format].tool, export.config
    if config.pairs.path is not None:
        return [
            f"# Preference pairs that a run was given, for {tool}\n",
            "They are the rows of preference data that existed, those that the run trained on; nothing here says who "
            "chose between the responses.\n",
        ]
    if not config.preference.is_mipo:
        reward = {
            "function": f"that of the function `{config.preference.function}`, with the faults that it has",
            "judge": "that of a judge, with the faults that it has",
            "pmi": "the response's pointwise mutual information with its prompt, which a repetition of the prompt "
            "raises, too",
        }[config.preference.chooser]
        return [
            f"# Preference pairs that a reward chose, for {tool}\n",
            f"A model made these pairs of its own answers: of {config.preference.samples} to each prompt the one with "
            f"the largest reward is chosen and the one with the smallest rejected. The reward is {reward}.\n",
        ]
    return [
        f"# Preference pairs of a MIPO run, for {tool}\n",
        f"A model made these pairs of its own answers, with no labels and no judge ([MIPO]({PAPER})): the chosen "
        "response was sampled under the prompt, the rejected one under a mismatched prompt. They teach a model to "
        "say what depends on its prompt. They do not say which answer is true, safe or liked.\n",
    ]


def _sources(config: Config) -> str:
    if config.pairs.path is not None:
        return (
            f"Pairs: {public_file(config.pairs.path)}. What their licence says holds for these rows, too; none is "
            "stated here."
        )
    mismatched = f"Mismatched prompts by the strategy {config.conditioning.strategy}. "
    return (
        f"Model: {public_model(config.model.source)}. Prompts: {public_file(config.prompts.path)}. "
        f"{mismatched if config.preference.mismatches else ''}What the licences of the model and the prompts say "
        "holds for these pairs, too; none is stated here."
    )


def _rounds(export: Export) -> list[str]:
    lines = []
    for each in export.rounds:
        source = "the model itself" if each.round.number == 0 else f"the policy of round {each.round.number - 1}"
        if each.facts.policy_commit is not None:
            source += f" at commit {each.facts.policy_commit}"
        if export.config.pairs.path is not None:
            source = "not sampled by the run"
        dropped = each.facts.statistics.dropped
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none"
        lines.append(f"| `{each.file}` | {source} | {each.pairs} | {each.rows} | {each.truncated} | {reasons} |")
    return lines


def _limits(export: Export) -> list[str]:
    config, has_ids = export.config, FORMATS[export.format].row is None
    lines = ["## What to know\n"]
    if not has_ids:
        ids = (
            "that were sampled; a tool that tokenises the texts anew may come to others, and ends every response, also "
            "one that was cut at the length limit, as the chat template ends a turn."
            if config.pairs.path is None
            else "of its own model and chat template."
        )
        lines += [
            f"- These are texts. The run trained on the token ids {ids} The format `parquet` holds the ids.",
            f"- Chat templates were given these variables beside the messages: `{config.prompts.template_arguments}`.",
        ]
    if any(each.rows > each.pairs for each in export.rounds) and not has_ids:
        most = max(each.rows // max(each.pairs, 1) for each in export.rounds)
        lines.append(
            f"- A pair had {most} rejected responses, and is as many rows here. The run's loss of a pair is the mean "
            "over them."
        )
    if config.train.shuffle_labels:
        lines.append(
            "- The run is a control: it swapped chosen and rejected of a seeded half when it trained. These rows are "
            "as they were sampled."
        )
    lines.append(
        "- Prompts and responses stand here as they are. Where prompts tell of people, the pairs do so, too. Responses "
        "may be false, and may repeat what a prompt says of its user.\n"
    )
    return lines


def _size(rows: int) -> str:
    return next((name for most, name in _SIZES if rows < most), "1M<n<10M")
