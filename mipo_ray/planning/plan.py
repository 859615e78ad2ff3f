"""What a run will do, worked out without an engine: checked prompts, pairs, steps, resources, what is finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mipo_ray.conditioning.needs import check_held_out, check_training_prompts
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.guard import check_guard
from mipo_ray.evaluation.judge.rows import check_judge, judged_protocols, refuse_other_references
from mipo_ray.evaluation.tasks.task_check import CheckedTask, check_finished_tasks, check_tasks
from mipo_ray.measures import primary_measure
from mipo_ray.models.source import check_embedding_model, check_model, check_policy_model
from mipo_ray.monitoring.trackers import check_trackers
from mipo_ray.pairs.given import GivenPair, PairSummary, check_pairs
from mipo_ray.pairs.reward_function import load_reward_function
from mipo_ray.planning.chat import check_chats
from mipo_ray.planning.disk import Unwritten, check_disk
from mipo_ray.planning.earlier_runs import EarlierRuns, read_earlier_runs
from mipo_ray.planning.lifetime import Lifetime, engine_lifetime
from mipo_ray.planning.schedule import Overlap, Schedule, evaluation_overlap, round_schedule
from mipo_ray.planning.token_counts import TokenCounts
from mipo_ray.prompts.chat_check import chat_check
from mipo_ray.prompts.check import PromptSummary
from mipo_ray.ray_cluster.resources import Node, Resources, check_resources, resolve, total
from mipo_ray.storage.configuration import check_config
from mipo_ray.storage.results import is_report_current, read_evaluation, read_results
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.storage.verdicts import awaits_verdict, planned_rounds
from mipo_ray.training.deepspeed_config import check_deepspeed_keys


@dataclass(frozen=True)
class Inputs:
    """What a run reads, checked: nobody checks it again. `config` names the primary measure of a run that measures;
    `prompts` are those to train on, or the pairs that exist in their place; `finished` holds the names of the stages
    that are done; `held_out` is None where the run does not measure; `token_notes` say what `TokenCounts` found;
    `earlier` is what earlier rounds took."""

    config: Config
    run: RunDirectory
    prompts: PromptSummary | PairSummary
    held_out: PromptSummary | None
    tasks: tuple[CheckedTask, ...]
    finished: tuple[str, ...]
    token_notes: tuple[str, ...] = field(default=(), kw_only=True)
    earlier: EarlierRuns = field(default=EarlierRuns(), kw_only=True)

    @property
    def rounds(self) -> list[Round]:
        """The rounds of the run, in order; they end with the one after which the guard has stopped it."""
        return planned_rounds(self.config, self.run)

    @property
    def stages(self) -> list[str]:
        """Every stage of the run, in order."""
        names = measured_stages(self.config, self.run, BASE, self.tasks)
        for round in self.rounds:
            names += [self.run.stage(round, "generate"), self.run.stage(round, "train")]
            names += measured_stages(self.config, self.run, round, self.tasks)
        return names

    @property
    def sampled(self) -> PromptSummary:
        """The training prompts of a run that samples its pairs; raises RuntimeError for one on pairs that exist."""
        if isinstance(self.prompts, PairSummary):
            raise RuntimeError("expected a run that samples its pairs, found pairs.path")
        return self.prompts

    @property
    def most_pairs(self) -> int:
        """The pairs of a round before filters."""
        return self.prompts.rows * self.config.generation.samples_per_prompt

    def unwritten(self, dtype: str) -> Unwritten:
        """What the run has still to write, with a policy in `dtype`."""
        return Unwritten(self.config, dtype, self.most_pairs, self.run, self.finished)

    @property
    def is_finished(self) -> bool:
        """Every stage is finished, and the files of results and report.html were written after the last one."""
        if not set(self.stages) <= set(self.finished) or awaits_verdict(self.config, self.run, self.rounds[-1]):
            return False
        return self._is_reported()

    def _is_reported(self) -> bool:
        # A kill right after the last stage was committed leaves older results, or a report of older results.
        measured = {round.key for round in [BASE, *self.rounds]} if self.config.evaluate.enabled else set()
        if not measured <= read_results(self.run).keys():
            return False
        evaluation = read_evaluation(self.run)
        names = {task.name for task in self.tasks}
        if any(not names <= evaluation.get(policy, {}).keys() for policy in measured):
            return False
        return is_report_current(self.run)


@dataclass(frozen=True)
class Plan(Inputs):
    """Checked inputs on a cluster that can hold them; `nodes` are those of `resources.check_resources`."""

    resources: Resources
    nodes: Sequence[Node] | None
    lifetime: Lifetime
    schedule: Schedule
    overlap: Overlap


def check_inputs(config: Config, run: RunDirectory, *, count_all: bool = False) -> Inputs:
    """Checks everything that can be checked without a cluster; raises UserError for what a user must mend.

    count_all: count the tokens of all long rows (`token_counts`).
    """
    check_trackers(config.trackers)
    check_model(config.model.source)
    check_policy_model(config.model.source, config.windows)
    check_deepspeed_keys(config.train)
    if config.embeds_prompts and config.conditioning.similar.model is not None:
        check_embedding_model(config.conditioning.similar.model)
    counts = TokenCounts(config, count_all=count_all)
    prompts = _check_training_data(config, counts)
    held_out = None
    if config.evaluate.enabled:
        held_out = check_held_out(config, [counts.of_prompts("evaluate.prompts")])
        config = with_primary_named(config, held_out)
    tasks = check_tasks(config, counts.of_item) if config.evaluate.enabled else ()
    check_guard(config, held_out, tasks)
    run.check_place()
    check_config(run, config)
    check_judge(config, run)
    if held_out is not None:
        refuse_other_references(config, run, held_out)
    check_chats(config, tasks)
    check_finished_tasks(tasks, run, range(config.rounds))
    earlier = read_earlier_runs(config, run)
    inputs = Inputs(config, run, prompts, held_out, tasks, finished_stages(config, run, tasks), earlier=earlier)
    return inputs if inputs.is_finished else replace(inputs, token_notes=counts.notes())


def with_primary_named(config: Config, held_out: PromptSummary) -> Config:
    """The configuration with the name of the measure that the run is about, which its config.yaml is to have before
    anything is sampled."""
    named = primary_measure(config.evaluate.primary, with_context=held_out.rows_with_context > 0)
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"primary": named})})


def _check_training_data(config: Config, counts: TokenCounts) -> PromptSummary | PairSummary:
    """What the run trains on: checked prompts or, with `pairs.path`, checked pairs and their chat template."""
    if config.pairs.path is None:
        watches = [counts.of_prompts("prompts")]
        if config.preference.function is not None:
            watches.append(load_reward_function(config.preference.function).watch)
        return check_training_prompts(config, watches)
    chat = chat_check(config.model.source, config.prompts.chat, config.prompts)

    def watch(where: str, pair: GivenPair) -> None:
        chat.look(where, pair.messages)
        chat.look_at_answers(where, pair.messages, (pair.chosen, *pair.rejected), pair.template_arguments)

    summary = check_pairs(config.pairs, watch)
    if config.train.shuffle_labels and summary.rejected > 1:
        raise UserError(
            "train.shuffle_labels swaps chosen and rejected: expected one rejected response in each row of "
            f"{config.pairs.path}, found {summary.rejected}"
        )
    return summary


def make_plan(inputs: Inputs, nodes: Sequence[Node], *, are_all: bool = True) -> Plan:
    """The plan on a cluster of these nodes; raises ResourceError where they cannot hold it.

    are_all: whether these are the nodes of the cluster that the run will join; else only what they are like is known.
    """
    resources = resolve(inputs.config, total(nodes))
    known = nodes if are_all else None
    check_resources(inputs.config, resources, total(nodes), known)
    check_disk(inputs.unwritten(resources.dtype))
    lifetime = engine_lifetime(inputs.config, resources, known)
    schedule = round_schedule(inputs.config, resources, known, inputs.prompts.rows, lifetime.most)
    overlap = evaluation_overlap(inputs.config, resources, known, lifetime)
    return Plan(**vars(inputs), resources=resources, nodes=known, lifetime=lifetime, schedule=schedule, overlap=overlap)


def measured_stages(config: Config, run: RunDirectory, round: Round, tasks: Sequence[CheckedTask]) -> list[str]:
    """The stages in which one policy is measured, in order; none without evaluation."""
    if not config.evaluate.enabled:
        return []
    of_tasks = [f"tasks/{task.name}" for task in tasks]
    judged = [f"judge/{protocol}" for protocol in judged_protocols(config.evaluate.judge, round)]
    return [run.stage(round, name) for name in ("evaluate", *of_tasks, *judged)]


def finished_stages(config: Config, run: RunDirectory, tasks: Sequence[CheckedTask] = ()) -> tuple[str, ...]:
    """Names of the finished stages in the run directory; raises StorageError for a damaged one."""
    measured = ["evaluate", *(f"tasks/{task.name}" for task in tasks), "judge/pairwise", "judge/pointwise"]
    candidates = [run.stage(BASE, stage) for stage in measured]
    for round in map(Round, range(config.rounds)):
        candidates += [run.stage(round, stage) for stage in ("generate", "train", *measured)]
    return tuple(stage for stage in candidates if run.is_finished(stage))
