"""What a run will do, worked out without an engine: checked prompts, pairs, steps, resources, what is finished."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mipo_ray.config import Config
from mipo_ray.config_evaluate import EvaluateConfig
from mipo_ray.config_train import TrainConfig
from mipo_ray.estimates import describe_estimates, describe_task_estimate
from mipo_ray.evaluation.evaluation_file import is_report_current, read_evaluation
from mipo_ray.evaluation.judge_rows import check_judge, judged_protocols
from mipo_ray.evaluation.task_check import CheckedTask, check_finished_tasks, check_tasks, task_stage, task_window
from mipo_ray.labels import shown
from mipo_ray.model_shape import model_shape
from mipo_ray.models import check_model, embedding_model
from mipo_ray.prompt_check import PromptSummary, check_held_out, check_training
from mipo_ray.resources import Node, NodeType, Request, Resources, check_resources, phases, requests, resolve
from mipo_ray.storage import RunDirectory
from mipo_ray.trackers import check_trackers


@dataclass(frozen=True)
class Plan:
    """A checked run. `finished` holds the names of the stages that are done already; `nodes` and `types` are those of
    `resources.check_resources`."""

    config: Config
    run: RunDirectory
    resources: Resources
    prompts: PromptSummary
    held_out: PromptSummary | None
    finished: tuple[str, ...]
    nodes: Sequence[Node] | None = None
    types: Sequence[NodeType] | None = None
    tasks: tuple[CheckedTask, ...] = ()

    @property
    def stages(self) -> list[str]:
        """Every stage of the run, in order."""
        names = self._measured(None)
        for round_index in range(self.config.rounds):
            names += [self.run.stage(round_index, "generate"), self.run.stage(round_index, "train")]
            names += self._measured(round_index)
        return names

    def _measured(self, round_index: int | None) -> list[str]:
        return measured_stages(self.config, self.run, round_index, self.tasks)

    @property
    def is_finished(self) -> bool:
        """Every stage is finished, and the files of results and report.html were written after the last one."""
        return set(self.stages) <= set(self.finished) and self._is_reported()

    def _is_reported(self) -> bool:
        # A kill right after the last stage was committed leaves older results, or a report of older results.
        measured = {"base", *map(str, range(self.config.rounds))} if self.config.evaluate.enabled else set()
        if not measured <= json.loads(self.run.read_text("results.json") or "{}").keys():
            return False
        evaluation = read_evaluation(self.run)
        names = {task.name for task in self.tasks}
        if any(not names <= evaluation.get(policy, {}).keys() for policy in measured):
            return False
        return is_report_current(self.run)


def make_plan(
    config: Config,
    run: RunDirectory,
    cluster: Mapping[str, float],
    nodes: Sequence[Node] | None = None,
    types: Sequence[NodeType] | None = None,
) -> Plan:
    """Checks everything that can be checked without an engine; raises UserError for what a user must mend.

    `cluster`, `nodes` and `types` are those of `resources.check_resources`.
    """
    check_trackers(config.trackers)
    check_model(config.model.path)
    if "similar_prompt" in config.conditioning.strategies and config.conditioning.similar.model is not None:
        embedding_model(config.conditioning.similar.model)
    prompts = check_training(config)
    held_out = check_held_out(config) if config.evaluate.enabled else None
    tasks = check_tasks(config) if config.evaluate.enabled else ()
    resources = resolve(config, cluster)
    check_resources(config, resources, cluster, nodes, types)
    run.check_writable()
    run.check_config(config)
    check_judge(config, run)
    check_finished_tasks(tasks, run, range(config.rounds))
    finished = finished_stages(config, run, tasks)
    return Plan(config, run, resources, prompts, held_out, finished, nodes, types, tasks)


def measured_stages(
    config: Config, run: RunDirectory, round_index: int | None, tasks: Sequence[CheckedTask]
) -> list[str]:
    """The stages in which one policy is measured, in order; none without evaluation."""
    if not config.evaluate.enabled:
        return []
    of_tasks = [task_stage(run, round_index, task.name) for task in tasks]
    protocols = judged_protocols(config.evaluate.judge, round_index)
    judged = [run.stage(round_index, f"judge/{protocol}") for protocol in protocols]
    return [run.stage(round_index, "evaluate"), *of_tasks, *judged]


def finished_stages(config: Config, run: RunDirectory, tasks: Sequence[CheckedTask] = ()) -> tuple[str, ...]:
    """Names of the finished stages in the run directory; raises StorageError for a damaged one."""
    measured = ["evaluate", *(f"tasks/{task.name}" for task in tasks), "judge/pairwise", "judge/pointwise"]
    candidates = [run.stage(None, stage) for stage in measured]
    for round_index in range(config.rounds):
        candidates += [run.stage(round_index, stage) for stage in ("generate", "train", *measured)]
    return tuple(stage for stage in candidates if run.read_manifest(stage) is not None)


def describe(plan: Plan) -> str:
    """The plan as text, for `--dry-run`."""
    config, train = plan.config, plan.config.train
    pool, sampling = config.generation.pool, config.generation.sampling
    samples, negatives = config.generation.samples_per_prompt, config.generation.negatives_per_prompt
    responses = plan.prompts.rows * samples + round(plan.prompts.rows * negatives * _share_sampled_afresh(config))
    pairs, rejected = plan.prompts.rows * samples, config.generation.rejected_per_pair
    device = "GPU" if plan.resources.on_gpu else "CPU"
    lines = [
        f"run directory   {plan.run.url}",
        f"model           {config.model.path}, {plan.resources.dtype}, window {config.model.max_model_len} tokens",
        f"rounds          {config.rounds}, seed {config.seed}",
        f"prompts         {plan.prompts.rows:,} rows of {config.prompts.path} "
        f"({plan.prompts.rows_with_context:,} with a context)",
        f"conditioning    {_strategy(config)}, blocks of {config.conditioning.block_size}",
        f"generate        {responses:,} responses of up to {sampling.max_tokens} tokens, temperature "
        f"{sampling.temperature:g}; for each prompt {samples} matched, {negatives} mismatched: {pairs:,} pairs before "
        f"filters" + (f", each with {rejected} rejected" if rejected > 1 else ""),
        *_training(train, pairs),
    ]
    if plan.held_out is not None:
        evaluate = config.evaluate
        lines.append(
            f"evaluate        {plan.held_out.rows:,} held-out prompts x {evaluate.samples_per_prompt} answers, each "
            f"scored under its own and {evaluate.other_prompts} other conditionings"
            + (f"; matrices of up to {evaluate.matrix} x {evaluate.matrix}" if evaluate.matrix else "")
        )
        lines += describe_judge(evaluate, plan.held_out.rows)
    lines += describe_tasks(config, plan.resources, plan.tasks)
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
    lines += _autoscaling_notes(plan)
    lines += describe_estimates(
        config, plan.resources, model_shape(config.model.path), plan.prompts.rows, plan.prompts.characters, responses
    )
    lines.append("stages")
    for stage in plan.stages:
        lines.append(f"  {stage:<28}{'finished' if stage in plan.finished else 'to do'}")
    return "\n".join(lines)


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
    return lines + describe_task_estimate(resources, model_shape(config.model.path), characters, generated)


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
    if not plan.config.ray.autoscaling:
        return line
    growth = (
        ""
        if plan.types is None
        else f", those that the autoscaler can start for {request.room_after_growth(plan.types):g}"
    )
    return f"{line} now{growth}"


def _autoscaling_notes(plan: Plan) -> list[str]:
    """What a plan for a cluster that grows cannot know."""
    config = plan.config
    if not config.ray.autoscaling:
        return []
    notes = []
    if plan.types is None:
        notes.append(
            "autoscaling     which nodes can be added is not known before they are asked for; a request that the "
            f"autoscaler calls infeasible, or that waits for {config.ray.wait_timeout_minutes:g} minutes, stops the run"
        )
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
    grains = [f"{train.checkpoint_steps:,} steps"] if train.checkpoint_steps is not None else []
    grains += [f"{train.checkpoint_minutes:g} minutes"] if train.checkpoint_minutes is not None else []
    return f"checkpoints every {' or '.join(grains)}" if grains else "no checkpoints inside a round"


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
