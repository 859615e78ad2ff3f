"""Talk to a run: the answers of its initial model and of its newest good policy, side by side while they come.

    python -m mipo_ray.chat RUN                              questions in the terminal; Ctrl-D ends
    python -m mipo_ray.chat RUN --context "I am a nurse."    with what is known of the user, and so with context PMI
    python -m mipo_ray.chat RUN --once "What shall I cook?"  one question, for scripts; --json for programs
    python -m mipo_ray.chat RUN --page                       a page for this machine's browser, with blind votes
    python -m mipo_ray.chat RUN --rounds base,0,1            other policies of the run, or more of them

Engines, chat template, system message and sampling are the run's; key=value overrides what decides where they run
(generation.pool.cpus_per_engine=2, ray.address=auto). Beside each answer to a question with a context stands its
context PMI by the initial model: log p(answer | question, context) - log p(answer | question), nats. Votes are kept in
chat/votes.jsonl of the run. Exit codes are those of mipo_ray.run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import sys
from collections.abc import Callable, Sequence

from mipo_ray.chat.policies import ChatRun, open_chat
from mipo_ray.chat.questions import SEEDS, SETTINGS, Question, collected, new_seed, prompt_row, sampling_of
from mipo_ray.command import run_command
from mipo_ray.config.generation import SamplingConfig
from mipo_ray.config.recipe import split_arguments
from mipo_ray.config.trust import FLAG, FLAG_HELP
from mipo_ray.terminal import say_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = _parse(arguments)

    def work() -> int:
        chat = open_chat(options.run, options.rounds, options.overrides, trusts_recipe=options.trust_recipe)
        given = {name: value for name in SETTINGS if (value := getattr(options, name)) is not None}
        sampling = sampling_of(chat.config, given)
        seeds = _seeds(options.seed)
        context = (options.context or "").strip()
        if options.once is not None:
            question = Question(options.once.strip(), context, sampling, seeds())
            prompt_row(question, chat.config.prompts)  # what is wrong with it is told before an engine starts
            return _once(chat, question, as_json=options.json)
        if options.page:
            return _page(chat, sampling, context, options.port)
        return _talk(chat, sampling, context, seeds)

    return run_command(work, resumes=False)


def _talk(chat: ChatRun, sampling: SamplingConfig, context: str, seeds: Callable[[], int]) -> int:
    from mipo_ray.chat.conversation import Conversation, talk
    from mipo_ray.chat.engines import running_engines

    with running_engines(chat) as answerer, asyncio.Runner() as runner:
        runner.run(answerer.start())
        talk(answerer, Conversation(chat.rounds, sampling, context, seeds), runner.run)
    return 0


def _once(chat: ChatRun, question: Question, *, as_json: bool) -> int:
    from mipo_ray.chat.conversation import show, terminal
    from mipo_ray.chat.engines import running_engines

    # Ray passes on what its workers print: among JSON it has no place.
    aside = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with aside, running_engines(chat) as answerer, asyncio.Runner() as runner:
        runner.run(answerer.start())
        if not as_json:
            runner.run(show(answerer, question, chat.rounds, terminal()))
            return 0
        answers = runner.run(collected(answerer, question, chat.rounds))
    asked = {"question": question.text, "context": question.context, "seed": question.seed}
    say_json({**asked, "sampling": question.sampling.model_dump(), "answers": [one.to_json() for one in answers]})
    return 0


def _page(chat: ChatRun, sampling: SamplingConfig, context: str, port: int) -> int:
    from mipo_ray.chat.engines import running_engines
    from mipo_ray.chat.guard import bound_socket
    from mipo_ray.chat.page import ChatPage, serve
    from mipo_ray.chat.votes import read_votes

    bound_socket(port).close()  # a port that is taken is told before an engine starts, as is a damaged file of votes
    read_votes(chat.run)
    with running_engines(chat) as answerer, asyncio.Runner() as runner:
        runner.run(answerer.start())
        runner.run(serve(ChatPage(chat, answerer, sampling, context), port))
    return 0


def _seeds(first: int | None) -> Callable[[], int]:
    """Makes the seed of each question: the one that is given and those after it, or new ones."""
    return new_seed if first is None else itertools.count(first).__next__


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mipo_ray.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arguments", nargs="+", metavar="RUN [key=value ...]", help="run directory, and overrides")
    parser.add_argument(
        "--rounds", metavar="KEYS", help="whose answers: base,0,1 (default: the base and the newest good round)"
    )
    parser.add_argument("--context", metavar="TEXT", help="what is known of the user")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--once", metavar="QUESTION", help="ask one question, print the answers and end")
    where.add_argument("--page", action="store_true", help="a page on 127.0.0.1, under an address with a token")
    parser.add_argument("--json", action="store_true", help="with --once: print JSON")
    parser.add_argument("--port", type=int, default=0, metavar="PORT", help="with --page (default: a free one)")
    parser.add_argument("--temperature", type=float, help="0 is greedy decoding (default: the run's)")
    parser.add_argument("--top-p", type=float, metavar="SHARE", help="nucleus sampling mass (default: the run's)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="length limit (default: the run's)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the first question (default: a new one for each)")
    parser.add_argument(FLAG, action="store_true", help=FLAG_HELP)
    options = parser.parse_intermixed_args(arguments)
    runs, options.overrides = split_arguments(options.arguments)
    if len(runs) != 1:
        parser.error(f"expected one run directory, found {', '.join(runs) or 'none'}")
    if options.json and options.once is None:
        parser.error("--json: goes with --once")
    if options.port and not options.page:
        parser.error("--port: goes with --page")
    if options.seed is not None and not 0 <= options.seed < SEEDS:
        parser.error(f"--seed: expected a whole number from 0 to {SEEDS - 1}, found {options.seed}")
    if options.seed is not None and options.page:
        parser.error("--seed: the page has a setting for it")
    options.run = runs[0]
    return options


if __name__ == "__main__":
    sys.exit(main())
