"""The local page: questions, answers as they come, and blind votes, by a server that this machine alone reaches.

`GET /TOKEN/` is the page, `GET /TOKEN/run` what it needs to know, `POST /TOKEN/ask` answers with one JSON object a line
while the answers come, `POST /TOKEN/vote` keeps a vote and says whose answers they were.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Annotated, Any, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mipo_ray.chat.guard import HOST, MOST_BYTES, bound_socket, guard, headers_for, new_token
from mipo_ray.chat.policies import ChatRun
from mipo_ray.chat.questions import SEEDS, SETTINGS, Answer, Answerer, Piece, Question, new_seed, sampling_of
from mipo_ray.chat.votes import Vote, keep_vote, new_order_seed, read_votes, shuffled, tally
from mipo_ray.config.generation import SamplingConfig
from mipo_ray.errors import UserError
from mipo_ray.storage.rounds import Round
from mipo_ray.terminal import plain, say

MOST_WAITING = 20  # answers that no vote was given on: the oldest are forgotten


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class Asked(_Body):
    """What the page asks. rounds: keys of the policies; seed: null for a new one."""

    question: Annotated[str, Field(min_length=1)]
    context: str = ""
    rounds: Annotated[list[str], Field(min_length=1)]
    blind: bool = False
    sampling: dict[str, float | int] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None


class Voted(_Body):
    """A vote: on which answers, and which of them, counted from the left from 0; null: no difference."""

    id: str
    choice: Annotated[int, Field(ge=0)] | None


Body = TypeVar("Body", bound=_Body)


@dataclass(frozen=True)
class Waiting:
    """Answers that were shown blind, in the order of the page, until a vote is given on them."""

    question: Question
    order_seed: int
    answers: tuple[Answer, ...]


@dataclass
class ChatPage:
    """The page of one chat. sampling and context: what its settings are at first."""

    chat: ChatRun
    answerer: Answerer
    sampling: SamplingConfig
    context: str = ""
    _waiting: OrderedDict[str, Waiting] = field(default_factory=OrderedDict)

    def application(self, token: str, port: int) -> web.Application:
        """The server's side, for requests that have the token."""
        html = resources.files("mipo_ray.chat").joinpath("page.html").read_text(encoding="utf-8")
        headers = headers_for(html)

        async def page(_: web.Request) -> web.Response:
            return web.Response(text=html, content_type="text/html", charset="utf-8")

        async def add_headers(_: web.Request, response: web.StreamResponse) -> None:
            response.headers.update(headers)
            response.headers["Server"] = "mipo-ray"  # and not which version of what

        application = web.Application(middlewares=[guard(token, port), _mistakes_told], client_max_size=MOST_BYTES)
        application.on_response_prepare.append(add_headers)
        application.router.add_get(f"/{token}/", page)
        application.router.add_get(f"/{token}/run", self._run)
        application.router.add_post(f"/{token}/ask", self._ask)
        application.router.add_post(f"/{token}/vote", self._vote)
        return application

    async def _run(self, _: web.Request) -> web.Response:
        return web.json_response(
            {
                "run": plain(self.chat.run.url),
                "model": self.chat.config.model.source,
                "rounds": [round.key for round in self.chat.rounds],
                "sampling": {name: getattr(self.sampling, name) for name in SETTINGS},
                "context": self.context,
                "tally": await self._tally(),
            }
        )

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        asked = await _body(request, Asked)
        question, rounds = self._question(asked), self._rounds(asked.rounds)
        order_seed = new_order_seed()
        if asked.blind:
            rounds = shuffled(rounds, order_seed)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionResetError):  # nobody listens any more, so nothing more is asked
            await self._answer(response, question, rounds, order_seed if asked.blind else None)
            await response.write_eof()
        return response

    async def _answer(
        self, response: web.StreamResponse, question: Question, rounds: Sequence[Round], order_seed: int | None
    ) -> None:
        """Writes the events of one question; with an order seed it is blind: places stand in them, and no names."""

        async def tell(event: str, **values: Any) -> None:
            await response.write(json.dumps({"event": event, **values}).encode() + b"\n")

        names = [round.key for round in rounds] if order_seed is None else None
        await tell("asked", seed=question.seed, places=len(rounds), rounds=names)
        answers: list[Answer] = []
        try:
            async with contextlib.aclosing(self.answerer.ask(question, rounds)) as parts:
                async for part in parts:
                    place = rounds.index(part.round)
                    if isinstance(part, Piece):
                        await tell("piece", place=place, text=part.text)
                        continue
                    answers.append(part)
                    figures = part.to_json() if order_seed is None else {"text": part.text}
                    await tell("answer", place=place, **figures)
        except UserError as error:
            await tell("error", message=plain(str(error)))
            return
        name = None
        if order_seed is not None and len(rounds) > 1:
            name = secrets.token_urlsafe(12)
            self._waiting[name] = Waiting(question, order_seed, tuple(answers))
            while len(self._waiting) > MOST_WAITING:
                self._waiting.popitem(last=False)
        await tell("done", vote=name)

    async def _vote(self, request: web.Request) -> web.Response:
        voted = await _body(request, Voted)
        if (waiting := self._waiting.get(voted.id)) is None:
            raise UserError("these answers wait for no vote: it was given before, or they were shown too long ago")
        if voted.choice is not None and voted.choice >= len(waiting.answers):
            raise UserError(f"choice: expected less than {len(waiting.answers)}, found {voted.choice}")
        del self._waiting[voted.id]
        try:
            await asyncio.to_thread(keep_vote, self.chat.run, _vote_of(waiting, voted.choice))
        except Exception:
            self._waiting[voted.id] = waiting  # it was not kept, and can be given again
            raise
        return web.json_response(
            {"answers": [answer.to_json() for answer in waiting.answers], "tally": await self._tally()}
        )

    async def _tally(self) -> dict[str, Any]:
        return tally(await asyncio.to_thread(read_votes, self.chat.run)).to_json()

    def _question(self, asked: Asked) -> Question:
        sampling = sampling_of(self.chat.config, asked.sampling, self.sampling)
        seed = new_seed() if asked.seed is None else asked.seed
        return Question(asked.question.strip(), asked.context.strip(), sampling, seed)

    def _rounds(self, keys: Sequence[str]) -> list[Round]:
        for key in keys:
            if key not in [round.key for round in self.chat.rounds]:
                there = ", ".join(round.key for round in self.chat.rounds)
                raise UserError(f"rounds: expected some of {there}, found {plain(key)[:40]}")
        return [round for round in self.chat.rounds if round.key in keys]


async def serve(page: ChatPage, port: int) -> None:
    """Serves a page until it is cancelled, and says where; port 0: a free one."""
    async with served(page, port) as address:
        say(address)
        say("the page, for this machine alone; whoever has this address can ask and vote. Ctrl-C ends it.")
        await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def served(page: ChatPage, port: int) -> AsyncIterator[str]:
    """Serves a page, under an address with a new token, until the block ends."""
    token = new_token()
    with bound_socket(port) as place:
        number = place.getsockname()[1]
        # Answers that still come when somebody stops the server are given up.
        runner = web.AppRunner(page.application(token, number), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.SockSite(runner, place).start()
            yield f"http://{HOST}:{number}/{token}/"
        finally:
            await runner.cleanup()


def _vote_of(waiting: Waiting, choice: int | None) -> Vote:
    question, answers = waiting.question, waiting.answers
    return Vote(
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        question=question.text,
        context=question.context,
        shown=tuple(answer.round.key for answer in answers),
        order_seed=waiting.order_seed,
        choice=None if choice is None else answers[choice].round.key,
        answers=tuple(answer.text for answer in answers),
        seed=question.seed,
        sampling=question.sampling.model_dump(),
    )


async def _body(request: web.Request, kind: type[Body]) -> Body:
    """The JSON of a request; raises UserError with what is wrong with it."""
    try:
        return kind.model_validate_json(await request.read())
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{place}: {first['msg']}" if place else first["msg"]) from None


@web.middleware
async def _mistakes_told(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answers 400, with the message, where something can be mended."""
    try:
        return await handler(request)
    except UserError as error:
        return web.json_response({"message": plain(str(error))}, status=400)
