"""Judging through an OpenAI-compatible server, with the `openai` client.

The client sends a request again after a timeout, a lost connection, HTTP 408, 409, 429 or 5xx, waits longer each time,
and heeds Retry-After. The key comes from the environment of the driver and is written nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data
from pydantic import SecretStr
from ray.data import ActorPoolStrategy

from mipo_ray.config.judge import JudgeConfig
from mipo_ray.config.trust import is_openai
from mipo_ray.errors import UserError
from mipo_ray.monitoring.events import Events
from mipo_ray.monitoring.progress import Tally
from mipo_ray.redaction import read_secret

ENGINE = "endpoint"  # where events of vLLM actors name an engine
CHECK_SECONDS = 30.0
# Newer servers take the limit under its second name alone; which one this is they say with the first request.
LIMITS = ("max_tokens", "max_completion_tokens")
_NAMED_AS_UNKNOWN = re.compile(
    r"max_completion_tokens|unsupported|not supported|does not support|unknown|unrecogni[sz]ed|unexpected|extra"
    r"|not permitted|not allowed|deprecated",
    re.IGNORECASE,
)
_TEXT_PARTS = ("text", "output_text")
_THOUGHT_PARTS = ("thinking", "reasoning", "redacted_thinking")
# What the client raises over HTTP 200 with something that is not the API's: it does not check what it parses.
_OTHER_FORM = (AttributeError, TypeError, ValueError)
# Variables that the client sends along by itself, whichever server it asks: they are meant for OpenAI.
_SENT_ALONG = ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS")
NO_KEY = "none"  # sent where there is no key: the client insists on one


def endpoint_key(judge: JudgeConfig) -> SecretStr:
    """The key in the environment of this process; a server without keys takes any.

    Raises UserError for a key that no HTTP header can hold: the client's own error would show it.
    """
    key = read_secret(judge.api_key_variable)
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"environment variable {judge.api_key_variable}: expected the key of evaluate.judge.endpoint in printable "
            "ASCII characters, found others (not shown)"
        )
    return SecretStr(key or NO_KEY)


def check_endpoint(judge: JudgeConfig) -> None:
    """Raises UserError when the server does not answer, refuses the key, or does not list the judge's model."""
    import openai

    assert judge.endpoint is not None
    key = endpoint_key(judge)
    with _the_key_alone(judge.endpoint):
        client = openai.OpenAI(
            base_url=judge.endpoint,
            api_key=key.get_secret_value(),
            timeout=min(CHECK_SECONDS, judge.timeout_seconds),
            max_retries=min(2, judge.max_retries),
        )
    try:
        names = [model.id for model in client.models.list()]
    except (openai.AuthenticationError, openai.PermissionDeniedError, openai.APIConnectionError) as error:
        raise _refused(judge, key, error) from None
    except openai.APIError:
        return  # a server that lists no models may still judge
    except _OTHER_FORM as error:
        raise _refused(judge, key, error) from None
    if names and judge.model not in names:
        raise UserError(f"evaluate.judge.model: {judge.endpoint} serves {', '.join(names[:10])}; found {judge.model!r}")


def map_endpoint(
    rows: ray.data.Dataset, actor_class: type, arguments: tuple[Any, ...], judge: JudgeConfig, requests: int
) -> ray.data.Dataset:
    """Sends every block through one actor that asks the judge's server, made with `arguments`; lazy.

    It runs beside the driver, where localhost and the environment are what the user meant. requests: of one block.
    """
    blocks = -(-judge.max_concurrent_requests // requests) + 1
    return rows.map_batches(
        actor_class,
        fn_constructor_args=arguments,
        batch_format="pyarrow",
        batch_size=None,
        compute=ActorPoolStrategy(
            size=1, max_tasks_in_flight_per_actor=2 * blocks, max_concurrent_calls_per_actor=blocks
        ),
        num_cpus=0,
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
    )


class EndpointJudge:
    """A Ray Data actor: adds `judgement` (text), `finish_reason` and `tokens` to blocks that hold `prompt`."""

    def __init__(self, judge: JudgeConfig, key: SecretStr, events: Events):
        import openai

        self._judge = judge
        self._key = key
        self._events = events
        self._tally = Tally(events)
        assert judge.endpoint is not None
        with _the_key_alone(judge.endpoint):
            self._client = openai.AsyncOpenAI(
                base_url=judge.endpoint,
                api_key=key.get_secret_value(),
                timeout=judge.timeout_seconds,
                max_retries=judge.max_retries,
            )
        self._free = asyncio.Semaphore(judge.max_concurrent_requests)
        self._limit = LIMITS[0]
        events.tell({"event": "ready", "engine": ENGINE})

    async def __call__(self, block: pa.Table) -> AsyncIterator[pa.Table]:
        """Judges every row of the block; yields the block once. Raises UserError when the server refuses a request."""
        started = time.monotonic()
        judged = await asyncio.gather(*map(self._counted, block.select(["prompt_id", "prompt"]).to_pylist()))
        self._tally.tell()
        block = block.append_column("judgement", pa.array([text for text, _, _ in judged], pa.string()))
        block = block.append_column("finish_reason", pa.array([reason for _, reason, _ in judged], pa.string()))
        block = block.append_column("tokens", pa.array([tokens for _, _, tokens in judged], pa.int32()))
        self._events.emit(
            {
                "event": "generated",
                "engine": ENGINE,
                "rows": block.num_rows,
                "generated_tokens": sum(tokens for _, _, tokens in judged),
                "block_seconds": time.monotonic() - started,
            }
        )
        yield block

    async def texts(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """What the judge says to each row's `prompt`, uncounted; raises UserError when the server refuses one."""
        return [text for text, _, _ in await asyncio.gather(*map(self._ask, rows))]

    async def _counted(self, row: dict[str, Any]) -> tuple[str, str, int]:
        answer = await self._ask(row)
        self._tally.answered(1, answer[2])
        return answer

    async def _ask(self, row: dict[str, Any]) -> tuple[str, str, int]:
        """What the server answers: text, finish reason, tokens (0 where it does not say)."""
        import openai

        async with self._free:
            try:
                completion = await self._complete(row["prompt"])
                if not completion.choices:
                    return "", "", 0
                choice, usage = completion.choices[0], completion.usage
                reason, tokens = choice.finish_reason, usage.completion_tokens if usage else 0
                text = _text_of(choice.message.content)
            except (openai.APIError, *_OTHER_FORM) as error:
                raise _refused(self._judge, self._key, error, f", prompt {row['prompt_id']!r}") from None
        # Servers may leave either out, or fill it with something else.
        return text, reason if isinstance(reason, str) else "", tokens if isinstance(tokens, int) else 0

    async def _complete(self, prompt: str) -> Any:
        """What the server answers to a prompt; of the two names of the length limit, the one that it takes is kept."""
        import openai

        limit = self._limit
        try:
            return await self._create(prompt, limit)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if limit != LIMITS[0] or not _refuses_limit(str(error)):
                raise
            self._limit = LIMITS[1]
        return await self._create(prompt, LIMITS[1])

    async def _create(self, prompt: str, limit: str) -> Any:
        # No seed: vLLM on CPUs cannot sample with one where prompts are prefilled in chunks.
        options: dict[str, Any] = {limit: self._judge.max_tokens}
        return await self._client.chat.completions.create(
            model=str(self._judge.model),
            messages=[{"role": "user", "content": prompt}],
            temperature=self._judge.temperature,
            **options,
        )


@contextlib.contextmanager
def _the_key_alone(endpoint: str) -> Iterator[None]:
    """While the block makes a client, it finds nothing else in the environment to send, unless the server is OpenAI's.

    A recipe names the server; which key goes there, `mipo_ray.config.trust` decides.
    """
    hidden = {} if is_openai(endpoint) else {name: os.environ.pop(name) for name in _SENT_ALONG if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _refuses_limit(said: str) -> bool:
    """Whether a server does not know `max_tokens`; a limit that is too large for it is another fault."""
    others = said.replace(LIMITS[0], "")
    return LIMITS[0] in said and _NAMED_AS_UNKNOWN.search(others) is not None


def _text_of(content: Any) -> str:
    """The text of an answer: as it is, or that of its parts, thoughts left out.

    Raises ContentError, which names it, for anything that holds no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ContentError(f"expected text or a list of parts, found {type(content).__name__}")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind in _THOUGHT_PARTS:
            continue
        text = part.get("text") if kind in _TEXT_PARTS else None
        if not isinstance(text, str):
            raise ContentError(f"expected parts of text, found one of type {kind!r}")
        texts.append(text)
    return "".join(texts)


class ContentError(ValueError):
    """An answer of the judge that holds something else than text."""


def _refused(judge: JudgeConfig, key: SecretStr, error: Exception, where: str = "") -> UserError:
    """What the server said, or that it said nothing; what was judged before is kept."""
    import openai

    what = str(error)
    if isinstance(error, openai.APITimeoutError):
        what = f"no answer within {judge.timeout_seconds:g} seconds"
    elif isinstance(error, openai.APIConnectionError):
        what = f"cannot be reached: {error.__cause__ or error}"
    elif isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        # Servers repeat a part of the key in their message.
        what = f"refuses the key in the environment variable {judge.api_key_variable}"
    elif isinstance(error, ContentError):
        what = f"its answer: {error}"
    elif isinstance(error, _OTHER_FORM):
        what = (
            "expected an OpenAI-compatible API, found an answer of another form, as a web page has it (does the URL "
            f"lack /v1?): {type(error).__name__}: {error}"
        )
    if key.get_secret_value() != NO_KEY:
        what = what.replace(key.get_secret_value(), f"(the key in {judge.api_key_variable})")
    tried = f" (sent again {judge.max_retries} times)" if _is_sent_again(error) else ""
    return UserError(
        f"evaluate.judge.endpoint {judge.endpoint}{where}: {what}{tried}. Judgements made so far are kept: the same "
        "command goes on where it stopped"
    )


def _is_sent_again(error: Exception) -> bool:
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError)
