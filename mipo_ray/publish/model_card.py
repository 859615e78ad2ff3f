"""The model card of a run's policy: what it is, what was measured and how surely, how it was made, its limits."""

from __future__ import annotations

import json
import shlex
from typing import Any

from mipo_ray.config.public import public_file, public_model, public_settings
from mipo_ray.config.yaml_text import dump_yaml
from mipo_ray.evaluation.figures import format_change
from mipo_ray.evaluation.intervals import change_word
from mipo_ray.measures import format_value, measure_of
from mipo_ray.pairs.card import PAPER
from mipo_ray.publish.policy import Policy
from mipo_ray.report.run_report import installed_versions
from mipo_ray.storage.entries import Entry
from mipo_ray.storage.results import read_evaluation, read_results
from mipo_ray.storage.rounds import BASE, Round

# The model on the Hub whose weights, in four bits, the embedded one was made of.
EMBEDDED_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"

_LIMITS = (
    "Training rewards answers that depend on the prompt or the user. It has no notion of truth: nothing in it makes a "
    "wrong answer right, and a fluent answer that fits the user can still be false. Nor does it make a model safer.",
    "Pointwise mutual information can be gamed: repeating the context scores high. That is why length, copied 3-grams "
    "and distinct words stand beside it.",
    "The judge of measures that end in `_initial` is the model that training began with. A rise says that the answers "
    "became more specific in its eyes, not that a person would prefer them.",
    "Intervals are of 95 %, over the held-out users and questions of one run with one seed; another seed may give "
    "other figures. Verdicts on other measures than the primary one are corrected for their number.",
)

# Of a policy that was trained on pairs which existed, or which a reward chose.
_LIMITS_OF_CHOICES = (
    "Training rewards what was chosen in its pairs, with the faults that those choices have.",
    _LIMITS[-1],
)


def render_card(policy: Policy, name: str, *, adapter_rank: int | None = None) -> str:
    """The card as Markdown, with the head that the Hub reads. adapter_rank: of an adapter; None: the whole model."""
    config = policy.config
    kind = "A LoRA adapter of" if adapter_rank is not None else "A language model made of"
    parts = [
        f"---\n{dump_yaml(_head(policy, is_adapter=adapter_rank is not None))}---\n",
        f"# {name.partition('/')[2]}\n",
        f"{kind} {public_model(config.model.source)} by {_method(policy)}\n",
        *_control(policy),
        *_measures(policy),
        *_loading(policy, name, adapter_rank),
        *_making(policy),
        "## Limits\n",
        *(f"- {limit}" for limit in (_LIMITS if config.is_mipo else _LIMITS_OF_CHOICES)),
        "",
        "## Versions\n",
        "Installed where this card was written; earlier rounds may have been made with others.\n",
        ", ".join(f"{package} {version}" for package, version in installed_versions().items()) + ".\n",
        f"The licence of {public_model(config.model.source)} holds for this model, too; none is stated here.\n",
    ]
    return "\n".join(parts)


def base_on_hub(policy: Policy) -> str | None:
    """The Hub's name of the model that the run began with; None where it is none of the Hub."""
    source = policy.config.model.source
    first = policy.generated.get(Round(0))
    return source.partition("@")[0] if first is not None and first.policy_commit is not None else None


def _head(policy: Policy, *, is_adapter: bool) -> dict[str, Any]:
    head: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            *(["mipo"] if policy.config.is_mipo else []),
            *("dpo", "mipo-ray"),
            *(["lora"] if is_adapter else []),
        ],
    }
    base = EMBEDDED_ON_HUB if policy.config.model.source == "embedded" else base_on_hub(policy)
    if base is not None:
        head |= {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    return head


def _method(policy: Policy) -> str:
    config = policy.config
    if config.pairs.path is not None:
        return (
            f"preference optimisation (`{config.train.objective}`) with mipo-ray, on preference pairs that existed: "
            f"{public_file(config.pairs.path)}."
        )
    rounds = f"{len(policy.trained)} {'round' if len(policy.trained) == 1 else 'rounds'}"
    if not config.preference.is_mipo:
        chooser = {
            "function": f"the reward function `{config.preference.function}`",
            "judge": f"the judge {public_model(str(config.evaluate.judge.model))}, which compared them two by two",
            "pmi": "their pointwise mutual information with the prompt",
        }[config.preference.chooser]
        return (
            f"{rounds} of preference optimisation (`{config.train.objective}`) with mipo-ray, on pairs of its own "
            f"answers: of {config.preference.samples} to each prompt the best against the worst, by {chooser}."
        )
    return (
        f"{rounds} of MIPO ([Mutual Information "
        f"Preference Optimization]({PAPER})) with mipo-ray: with preference pairs of its own answers, no labels, no "
        "verifier and no reward model. Rejected answers answered mismatched prompts by the strategy "
        f"`{config.conditioning.strategy}`."
    )


def _control(policy: Policy) -> list[str]:
    if not policy.config.train.shuffle_labels:
        return []
    return ["**This is a control**: chosen and rejected were swapped in a seeded half of the pairs.\n"]


def _measures(policy: Policy) -> list[str]:
    run, key = policy.run, policy.round.key
    found = [(name, entry) for name, entry in read_results(run).get(key, {}).items()]
    bases = dict(read_results(run).get(BASE.key, {}))
    evaluation = read_evaluation(run)
    for task, evaluated in evaluation.get(key, {}).items():
        base = evaluation.get(BASE.key, {}).get(task)
        found += [(f"{task}.{metric}", entry) for metric, entry in evaluated.metrics.items()]
        bases |= {f"{task}.{metric}": entry for metric, entry in (base.metrics if base else {}).items()}
    if not found:
        return ["## Measured\n", "Nothing was measured of this policy.\n"]
    return [
        "## Measured\n",
        f"On prompts that training did not see ({public_file(policy.config.evaluate.prompts.path)}), and on the tasks "
        "named. In brackets: 95 % intervals.\n",
        "| measure | n | before | this model | change | |",
        "|---|---|---|---|---|---|",
        *(_line(name, entry, bases.get(name)) for name, entry in found),
        "",
    ]


def _line(name: str, entry: Entry, base: Entry | None) -> str:
    verdict = change_word(entry)
    before = "" if base is None else format_value(base.value, base.unit)
    measure = measure_of(name)
    cells = (f"`{name}`, {measure.title}, {entry.unit}", str(entry.n), before, _with_interval(entry))
    return f"| {' | '.join(cells)} | {format_change(entry)} | {verdict} |"


def _with_interval(entry: Entry) -> str:
    value = format_value(entry.value, entry.unit)
    if entry.low is None or entry.high is None:
        return value
    return f"{value} [{format_value(entry.low, entry.unit)}, {format_value(entry.high, entry.unit)}]"


def _loading(policy: Policy, name: str, adapter_rank: int | None) -> list[str]:
    arguments = policy.config.prompts.template_arguments
    lines = ["## How to load it\n"]
    if adapter_rank is None:
        code = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        ]
        serve = f"vllm serve {name}{_template_option(policy)}"
    else:
        base = base_on_hub(policy)
        code = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")',
        ]
        serve = f"vllm serve {base} --enable-lora --max-lora-rank {lora_rank_of_vllm(adapter_rank)} "
        serve += f"--lora-modules mipo={name}{_template_option(policy)}"
    lines += ["```python", *code, "```\n", "```sh", serve, "```\n"]
    lines.append(
        "The chat template is the one of the model that training began with. The run gave it these variables beside "
        f"the messages: `{arguments}`.\n"
    )
    return lines


def _template_option(policy: Policy) -> str:
    """How vLLM's server is told the variables of the chat template; "" where there are none."""
    arguments = policy.config.prompts.template_arguments
    return f" --default-chat-template-kwargs {shlex.quote(json.dumps(arguments))}" if arguments else ""


# What vLLM 0.29 takes for --max-lora-rank (MaxLoRARanks in vllm/config/lora.py).
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def lora_rank_of_vllm(rank: int) -> int:
    """The least `--max-lora-rank` that vLLM takes an adapter of this rank with."""
    return next((allowed for allowed in _VLLM_RANKS if allowed >= rank), _VLLM_RANKS[-1])


def _making(policy: Policy) -> list[str]:
    config = policy.config
    lines = [
        "## How it was made\n",
        f"Prompts: {public_file(config.prompts.path)}. Each round samples pairs from the policy before it and trains "
        f"`{config.train.objective}` on those that no filter drops.\n"
        if config.pairs.path is None
        else f"Pairs: {public_file(config.pairs.path)}. It was trained by `{config.train.objective}` on those that no "
        "filter drops.\n",
        "| round | pairs kept of rows | steps | tokens | loss at first | at last |",
        "|---|---|---|---|---|---|",
    ]
    for round, facts in policy.trained.items():
        pairs = policy.generated.get(round)
        kept = "" if pairs is None else f"{pairs.statistics.kept} of {pairs.statistics.rows}"
        summary = facts.summary
        lines.append(
            f"| {round.key} | {kept} | {summary.steps} | {summary.tokens} | {summary.first_loss:.4f} | "
            f"{summary.last_loss:.4f} |"
        )
    return [
        *lines,
        "",
        f"Seed {config.seed}. Settings that differ from mipo-ray's defaults:\n",
        f"```yaml\n{dump_yaml(public_settings(config))}```\n",
    ]
