"""The plan as text, for `--dry-run` and for the beginning of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mipo_ray.config.evaluate import EvaluateConfig
from mipo_ray.config.guard import GuardConfig
from mipo_ray.config.label_selectors import shown
from mipo_ray.config.schema import Config
from mipo_ray.config.train import CHECKPOINT_MINUTES, TrainConfig
from mipo_ray.config.trust import describe_acts
from mipo_ray.evaluation.intervals import FEW, Estimate, clusters_behind, is_on_few
from mipo_ray.evaluation.summary import limit_text
from mipo_ray.evaluation.tasks.task_check import CheckedTask, task_window
from mipo_ray.models.chat_template import end_of_turn, read_chat_template
from mipo_ray.models.directory import local_path
from mipo_ray.models.hub import COMMIT, hub_file, hub_model
from mipo_ray.models.shape import model_shape
from mipo_ray.pairs.given import PairSummary
from mipo_ray.planning.cost import describe_cost, describe_task_cost
from mipo_ray.planning.disk import describe_disk
from mipo_ray.planning.estimates import RoundWork, describe_estimates, given_work, round_work
from mipo_ray.planning.plan import Plan
from mipo_ray.planning.prices import planned_gpu
from mipo_ray.prompts.check import PromptSummary
from mipo_ray.ray_cluster.resources import (
    Request,
    Resources,
    phases,
    requests,
)
from mipo_ray.storage.manifests import EvaluateFacts
from mipo_ray.storage.rounds import BASE


def describe(plan: Plan) -> str:
    """The plan as text, for `--dry-run`."""
    config, train = plan.config, plan.config.train
    pool = config.generation.pool
    device = "GPU" if plan.resources.on_gpu else "CPU"
    lines = [
        f"run directory   {plan.run.url}",
        f"model           {config.model.source}, {plan.resources.dtype}, window {config.model.max_model_len} tokens",
        f"rounds          {config.rounds}, seed {config.seed}",
        *(_given(config, plan.prompts) if isinstance(plan.prompts, PairSummary) else _sampled(config, plan.prompts)),
        *_training(train, plan.most_pairs),
    ]
    if plan.held_out is not None:
        evaluate = config.evaluate
        lines.append(
            f"evaluate        {plan.held_out.rows:,} held-out prompts x {evaluate.samples_per_prompt} answers, each "
            f"scored under its own and {evaluate.other_prompts} other conditionings"
            + (f"; matrices of up to {evaluate.matrix} x {evaluate.matrix}" if evaluate.matrix else "")
        )
        lines.append(_primary(evaluate, plan.held_out))
        lines += describe_judge(evaluate, plan.held_out.rows)
    lines += describe_tasks(config, plan.resources, plan.tasks)
    lines += _guard(config.guard)
    if config.evaluate.tasks and not config.evaluate.enabled:
        lines.append(f"tasks           {', '.join(config.evaluate.tasks)}: not measured (evaluate.enabled=false)")
    for phase, needs in phases(config, plan.resources).items():
        shards = {"generation": pool.tensor_parallel_size}
        shards["judging"] = config.evaluate.judge.tensor_parallel_size or pool.tensor_parallel_size
        what = (
            f"{pool.min_size} to {pool.max_size} engines, tensor parallel {shards[phase]}"
            if phase in shards
            else f"{_workers(train)} workers"
        )
        lines.append(f"{phase:<16}{what}; reserves {needs['CPU']:g} CPUs and {needs['GPU']:g} GPUs at least ({device})")
    lines += [_request(request, plan) for request in requests(config, plan.resources)]
    if config.starts_engines:
        lines.append(f"engines live    for the {plan.lifetime}{', and a scorer' * plan.lifetime.keeps_scorers}")
    lines.append(f"schedule        {plan.schedule}")
    if plan.held_out is not None:
        lines.append(f"evaluation      {plan.overlap}")
    lines += _end_of_turn(config)
    lines += _not_pinned(plan)
    lines += _cut_answers(plan)
    lines += describe_acts(config)
    lines += _autoscaling_notes(plan)
    shape = model_shape(config.model.source)
    work = _work(plan)
    lines += describe_estimates(config, plan.resources, shape, work)
    lines += describe_cost(plan, shape, work)
    lines += describe_disk(plan.unwritten(plan.resources.dtype))
    lines += [f"tokens          {note}" for note in plan.token_notes]
    lines.append("stages")
    width = max(28, 2 + max(map(len, plan.stages)))
    for stage in plan.stages:
        lines.append(f"  {stage:<{width}}{'finished' if stage in plan.finished else 'to do'}")
    return "\n".join(lines)


def _given(config: Config, pairs: PairSummary) -> list[str]:
    """What a run on pairs that exist trains on."""
    responses = f"{pairs.rejected} rejected responses each" if pairs.rejected > 1 else "one rejected response each"
    return [
        f"pairs           {pairs.rows:,} rows of {config.pairs.path}, in the columns of {pairs.format}, {responses}; "
        "nothing is sampled for training"
    ]


def _sampled(config: Config, prompts: PromptSummary) -> list[str]:
    """What a round samples, of what."""
    generation, preference = config.generation, config.preference
    if not preference.is_mipo:
        how = {
            "function": f"reward function {preference.function}; nothing is mismatched",
            "judge": "judge's comparisons, two by two; nothing is mismatched",
            "pmi": f"PMI with their prompt; mismatched prompts by {_strategy(config)}, blocks of "
            f"{config.conditioning.block_size}",
        }[preference.chooser]
        return [
            f"prompts         {prompts.rows:,} rows of {config.prompts.source}",
            f"preference      the best of {preference.samples} responses against the worst, by the {how}",
            f"generate        {_responses(config, prompts):,} responses of up to {generation.sampling.max_tokens} "
            f"tokens, temperature {generation.sampling.temperature:g}: {prompts.rows:,} pairs before filters",
        ]
    samples, negatives, rejected = (
        generation.samples_per_prompt,
        generation.negatives_per_prompt,
        generation.rejected_per_pair,
    )
    return [
        f"prompts         {prompts.rows:,} rows of {config.prompts.source} "
        f"({prompts.rows_with_context:,} with a context)",
        f"conditioning    {_strategy(config)}, blocks of {config.conditioning.block_size}",
        f"generate        {_responses(config, prompts):,} responses of up to {generation.sampling.max_tokens} tokens, "
        f"temperature {generation.sampling.temperature:g}; for each prompt {samples} matched, {negatives} mismatched: "
        f"{prompts.rows * samples:,} pairs before filters"
        + (f", each with {rejected} rejected" if rejected > 1 else ""),
    ]


def _responses(config: Config, prompts: PromptSummary) -> int:
    """How many responses a round samples."""
    if not config.preference.is_mipo:
        return prompts.rows * config.samples_of_prompt
    samples, negatives = config.generation.samples_per_prompt, config.generation.negatives_per_prompt
    return prompts.rows * samples + round(prompts.rows * negatives * _share_sampled_afresh(config))


def _work(plan: Plan) -> RoundWork:
    config, prompts = plan.config, plan.prompts
    if isinstance(prompts, PairSummary):
        return given_work(config, prompts)
    return round_work(config, prompts.rows, prompts.characters, _responses(config, prompts))


def _primary(evaluate: EvaluateConfig, held_out: PromptSummary) -> str:
    """What the run is about, and how many users and questions its intervals will rest on."""
    counts = Estimate(0.0, 0.0, 0.0, held_out.rows, users=held_out.users, questions=held_out.questions)
    few = f"; fewer than {FEW} of a kind make every interval a rough guide" if is_on_few(counts) else ""
    return f"primary         {evaluate.primary}, over {clusters_behind(counts)}{few}; other measures are exploratory"


def _guard(guard: GuardConfig) -> list[str]:
    """What a round must keep, where it is compared."""
    if guard.when_bad is None:
        return []
    bounds = [
        f"{name} {', '.join(f'{side} {amount:g}' for side, amount in bound.items())}"
        for name, bound in guard.bounds.items()
        if bound is not None
    ]
    return [f"guard           {guard.when_bad}, beside the base: {'; '.join(bounds)}"]


def describe_judge(evaluate: EvaluateConfig, prompts: int) -> list[str]:
    """Who judges, by what, and how often it is asked about each policy."""
    judge, answers = evaluate.judge, prompts * evaluate.samples_per_prompt
    if not judge.is_on:
        return []
    asked = {"pairwise": f"pairwise {2 * answers:,} of each round (each pair in both orders)"}
    asked["pointwise"] = f"pointwise {answers:,} of the base and of each round"
    return [
        f"judge           {judge.name}: {', '.join(asked[protocol] for protocol in judge.protocols)}; judgements of up "
        f"to {judge.max_tokens} tokens, temperature {judge.temperature:g}"
    ]


def describe_tasks(config: Config, resources: Resources, tasks: Sequence[CheckedTask]) -> list[str]:
    """Lines for the plan: every task, its items and how they are answered, and what that takes."""
    lines = []
    for task in tasks:
        how = "log-probs of the options"
        if task.sampling is not None:
            how = f"responses of up to {task.sampling.max_tokens} tokens, temperature {task.sampling.temperature:g}"
        lines.append(f"task            {task.name}: {task.items:,} items of {task.path}, {how}")
    if not tasks:
        return []
    if config.evaluate.task_max_model_len is not None:
        lines.append(f"task window     {task_window(config)} tokens")
    generated = sum(task.items * task.sampling.max_tokens for task in tasks if task.sampling is not None)
    characters = sum(task.characters for task in tasks)
    shape, gpu = model_shape(config.model.source), planned_gpu(config.cost)
    return lines + describe_task_cost(resources, gpu, shape, characters, generated)


def _request(request: Request, plan: Plan) -> str:
    """What each actor of a request reserves and where, what all of them reserve at most, and who has room for them."""
    where = f" on nodes with labels {shown(request.selector)}" if request.selector else ""
    strategy = f", {request.strategy}" if request.kind == "worker" and request.most > 1 else ""
    line = (
        f"{request.kind + 's':<16}{request.cpus:g} CPUs and {request.gpus:g} GPUs each{where}{strategy}; at most "
        f"{request.most * request.cpus:g} CPUs and {request.most * request.gpus:g} GPUs"
    )
    if plan.nodes is None:
        return line
    line += f"; the nodes have room for {request.room(plan.nodes)}"
    return f"{line} now" if plan.config.ray.autoscaling else line


def _cut_answers(plan: Plan) -> list[str]:
    """A warning where the base was measured already, and the length limit cut most of its answers."""
    base = plan.run.read_manifest(plan.run.stage(BASE, "evaluate"), EvaluateFacts)
    warned = "" if base is None else limit_text(base.facts.results, plan.config)
    return [f"warning         {warned}"] if warned else []


def _not_pinned(plan: Plan) -> list[str]:
    """A note where what the run reads from the Hub may be something else tomorrow."""
    config, found = plan.config, []
    named = hub_model(config.model.source)
    if named is not None and not local_path(config.model.source).is_dir():
        found.append(named)
    paths = [config.pairs.path or config.prompts.source, *(task.path for task in plan.tasks)]
    paths += [] if plan.held_out is None else [config.evaluate.prompts.source]
    found += [(file.repository, file.revision) for path in paths if (file := hub_file(path)) is not None]
    loose = dict.fromkeys(name for name, revision in found if revision is None or not COMMIT.fullmatch(revision))
    return (
        [f"not pinned      {', '.join(loose)}: as the Hub has it now; @COMMIT behind the name pins it"] if loose else []
    )


def _end_of_turn(config: Config) -> list[str]:
    """A note where the chat template ends a turn by a token that the model's files do not call an end token."""
    template = read_chat_template(config.model.source)
    end = None if template is None else end_of_turn(template, config.prompts.template_arguments)
    if template is None or end is None or end in template.end_tokens:
        return []
    named = ", ".join(template.end_tokens) or "none"
    return [f"end of turn     {end}, by which the chat template ends a turn, ends answers too; the model names {named}"]


def _autoscaling_notes(plan: Plan) -> list[str]:
    """What a plan for a cluster that grows cannot know."""
    config = plan.config
    if not config.ray.autoscaling:
        return []
    notes = [
        "autoscaling     which nodes can be added is not known before they are asked for; a request that the "
        f"autoscaler calls infeasible, or that waits for {config.ray.wait_timeout_minutes:g} minutes, stops the run"
    ]
    if not plan.resources.on_gpu and config.generation.pool.gpus_per_engine is config.train.gpus_per_worker is None:
        notes.append(
            "CPUs            no node has a GPU now, so that the run will use CPUs; set generation.pool.gpus_per_engine "
            "and train.gpus_per_worker where GPU nodes come on demand"
        )
    return notes


def _training(train: TrainConfig, pairs: int) -> list[str]:
    """How long training takes, what it optimises, and how it executes; `pairs` are those before filters."""
    steps = train.epochs * math.ceil(pairs / train.batch_size)
    objective: str = train.objective
    if train.needs_reference:
        objective += f", beta {train.beta:g}, reference {train.reference} ({train.reference_mode})"
    trained = f"LoRA of rank {train.lora.rank}" if train.lora.rank else "all weights"
    return [
        f"train           {steps:,} steps at most: {train.batch_size} pairs per step, {train.epochs} epoch(s), "
        f"learning rate {train.learning_rate:g}, {_checkpoints(train)}",
        f"objective       {objective}; trains {trained}",
        f"layout          {train.layout}, attention {train.attention}, micro-batches of up to "
        f"{train.micro_batch_tokens:,} tokens, ZeRO {train.zero_stage}",
    ]


def _checkpoints(train: TrainConfig) -> str:
    steps = train.checkpoint_steps
    return f"checkpoints every {f'{CHECKPOINT_MINUTES} minutes' if steps is None else f'{steps:,} steps'}"


def _workers(train: TrainConfig) -> str:
    return str(train.num_workers) if train.min_workers is None else f"{train.min_workers} to {train.num_workers}"


def _strategy(config: Config) -> str:
    """The strategy with the weights of a mixture and the fallback."""
    conditioning = config.conditioning
    weights = ", ".join(f"{name} {weight:g}" for name, weight in conditioning.mixture.items())
    fallback = f", else {conditioning.fallback}" if conditioning.fallback else ""
    return conditioning.strategy + (f" ({weights})" if weights else "") + fallback


def _share_sampled_afresh(config: Config) -> float:
    """Which share of the mismatched responses the engine samples; swapped_response reuses matched ones."""
    conditioning = config.conditioning
    if conditioning.strategy != "mixture":
        return 0.0 if conditioning.strategy == "swapped_response" else 1.0
    return 1 - conditioning.mixture.get("swapped_response", 0.0) / sum(conditioning.mixture.values())
