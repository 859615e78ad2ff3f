"""The section of the configuration that says which model judges the held-out answers, and how.

All of it may be set or changed over a finished run: nothing is sampled from a policy again. What was judged before
stays as it is, and records what it was judged with. Nothing here imports torch, ray or vllm.
"""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import field_validator, model_validator

from mipo_ray.config.base import Section, check_engine_arguments, check_room, execution_only
from mipo_ray.config.field_types import (
    Dtype,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Window,
)
from mipo_ray.errors import brief

Protocol = Literal["pairwise", "pointwise"]


class JudgeConfig(Section):
    """The judge of the held-out answers; without a model nothing is judged."""

    model: str | None = execution_only(
        None,
        "the judge, named as model.path is, in engines of its own; with judge.endpoint the name that the "
        "server knows it by; null: nothing is judged",
    )
    endpoint: str | None = execution_only(
        None,
        "base URL of an OpenAI-compatible server (http://host:8000/v1) that runs the judge; null: engines of this run",
    )
    protocols: tuple[Protocol, ...] = execution_only(
        ("pairwise",),
        "pairwise: each round's answers against the base's, each pair in both orders; pointwise: every "
        "answer is rated from 1 to 5 beside the row's reference answer",
        strict=False,
        min_length=1,
    )
    pairwise_template: str | None = execution_only(
        None,
        "file with a Jinja2 template of the judge's prompt; null: "
        "mipo_ray/judge/pairwise.txt.j2, which says what one must hold",
    )
    pointwise_template: str | None = execution_only(
        None, "the same for pointwise; null: mipo_ray/judge/pointwise.txt.j2"
    )
    temperature: NonNegativeFloat = execution_only(0.0, "of the judge's sampling; 0 is greedy decoding")
    max_tokens: PositiveInt = execution_only(512, "length limit of one judgement in tokens")
    dtype: Dtype = execution_only("auto", "of the judge's own engines, as model.dtype")
    max_model_len: Window = execution_only(
        4096, "context window of the judge's own engines in tokens: the prompt with both answers, and the judgement"
    )
    trust_remote_code: bool = execution_only(False, "run Python code that comes with the judge")
    tensor_parallel_size: PositiveInt | None = execution_only(
        None,
        "GPUs that share one of the judge's own engines; null: as generation.pool, whose number of "
        "engines, CPUs and labels hold for the judge too",
    )
    engine_args: dict[str, Any] = execution_only({}, "raw vLLM engine arguments of the judge's own engines")
    api_key_variable: str = execution_only(
        "OPENAI_API_KEY",
        "environment variable of the driver that holds the endpoint's key; where it is not set, none is "
        "sent that means anything",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
    )
    max_concurrent_requests: PositiveInt = execution_only(16, "requests that the endpoint works on at the same time")
    timeout_seconds: PositiveFloat = execution_only(300.0, "how long one request to the endpoint may take")
    max_retries: NonNegativeInt = execution_only(
        6, "times that a request is sent again after a timeout, a lost connection, HTTP 429 or 5xx, with growing pauses"
    )

    @property
    def is_on(self) -> bool:
        """Whether anything is judged."""
        return self.model is not None

    @property
    def has_own_engines(self) -> bool:
        """Whether the judge runs in engines of this run."""
        return self.model is not None and self.endpoint is None

    @property
    def name(self) -> str:
        """The judge as results name it."""
        return str(self.model) if self.endpoint is None else f"{self.model} at {self.endpoint}"

    @field_validator("endpoint")
    @classmethod
    def _is_a_plain_url(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        try:
            url = urlsplit(endpoint)
            is_url = url.scheme in ("http", "https") and bool(url.hostname)
        except ValueError:
            raise ValueError("expected a URL such as http://host:8000/v1") from None
        if "@" in endpoint or url.query or url.fragment:
            raise ValueError(
                "expected a URL without credentials or parameters; keys come from the environment (api_key_variable)"
            )
        if not is_url:
            raise ValueError(f"expected a URL such as http://host:8000/v1, found {brief(endpoint)}")
        return endpoint.rstrip("/")

    @model_validator(mode="after")
    def _is_a_judge(self) -> JudgeConfig:
        if self.endpoint is not None and self.model is None:
            raise ValueError("endpoint needs model: the name by which the server knows the judge")
        if len(set(self.protocols)) < len(self.protocols):
            raise ValueError(f"protocols: expected each one once, found {', '.join(self.protocols)}")
        if self.has_own_engines:
            check_room(("max_tokens", self.max_tokens), ("max_model_len", self.max_model_len))
        check_engine_arguments(self.engine_args, of_policy=False)
        return self
