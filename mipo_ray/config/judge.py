"""The section of the configuration that says which model judges the held-out answers, and how.

All of it may be set or changed over a finished run: nothing is sampled from a policy again. What was judged before
stays as it is, and records what it was judged with. Nothing here imports torch, ray or vllm.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from mipo_ray.config.base import (
    EXECUTION_ONLY,
    Dtype,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
)

Protocol = Literal["pairwise", "pointwise"]


class JudgeConfig(Section):
    """The judge of the held-out answers; without a model nothing is judged."""

    model: str | None = Field(
        None,
        description="the judge, named as model.path is, in engines of its own; with judge.endpoint the name that the "
        "server knows it by; null: nothing is judged",
        json_schema_extra=EXECUTION_ONLY,
    )
    endpoint: str | None = Field(
        None,
        description="base URL of an OpenAI-compatible server (http://host:8000/v1) that runs the judge; null: engines "
        "of this run",
        json_schema_extra=EXECUTION_ONLY,
    )
    protocols: tuple[Protocol, ...] = Field(
        ("pairwise",),
        strict=False,
        min_length=1,
        description="pairwise: each round's answers against the base's, each pair in both orders; pointwise: every "
        "answer is rated from 1 to 5 beside the row's reference answer",
        json_schema_extra=EXECUTION_ONLY,
    )
    pairwise_template: str | None = Field(
        None,
        description="file with a Jinja2 template of the judge's prompt; null: "
        "mipo_ray/evaluation/judge_pairwise.txt.j2, which says what one must hold",
        json_schema_extra=EXECUTION_ONLY,
    )
    pointwise_template: str | None = Field(
        None,
        description="the same for pointwise; null: mipo_ray/evaluation/judge_pointwise.txt.j2",
        json_schema_extra=EXECUTION_ONLY,
    )
    temperature: NonNegativeFloat = Field(
        0.0, description="of the judge's sampling; 0 is greedy decoding", json_schema_extra=EXECUTION_ONLY
    )
    max_tokens: PositiveInt = Field(
        512, description="length limit of one judgement in tokens", json_schema_extra=EXECUTION_ONLY
    )
    max_unreadable_share: Share = Field(
        0.5,
        description="stop when more than this share of a protocol's judgements names no verdict",
        json_schema_extra=EXECUTION_ONLY,
    )
    dtype: Dtype = Field(
        "auto", description="of the judge's own engines, as model.dtype", json_schema_extra=EXECUTION_ONLY
    )
    max_model_len: Annotated[int, Field(ge=16)] = Field(
        4096,
        description="context window of the judge's own engines in tokens: the prompt with both answers, and the "
        "judgement",
        json_schema_extra=EXECUTION_ONLY,
    )
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the judge", json_schema_extra=EXECUTION_ONLY
    )
    tensor_parallel_size: PositiveInt | None = Field(
        None,
        description="GPUs that share one of the judge's own engines; null: as generation.pool, whose number of "
        "engines, CPUs and labels hold for the judge too",
        json_schema_extra=EXECUTION_ONLY,
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict,
        description="raw vLLM engine arguments of the judge's own engines",
        json_schema_extra=EXECUTION_ONLY,
    )
    api_key_variable: str = Field(
        "OPENAI_API_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable of the driver that holds the endpoint's key; where it is not set, none is "
        "sent that means anything",
        json_schema_extra=EXECUTION_ONLY,
    )
    max_concurrent_requests: PositiveInt = Field(
        16, description="requests that the endpoint works on at the same time", json_schema_extra=EXECUTION_ONLY
    )
    timeout_seconds: PositiveFloat = Field(
        300.0, description="how long one request to the endpoint may take", json_schema_extra=EXECUTION_ONLY
    )
    max_retries: NonNegativeInt = Field(
        6,
        description="times that a request is sent again after a timeout, a lost connection, HTTP 429 or 5xx, with "
        "growing pauses",
        json_schema_extra=EXECUTION_ONLY,
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
        # The configuration is written to the run directory and printed: a key must not stand in it.
        if "@" in endpoint or url.query or url.fragment:
            raise ValueError(
                "expected a URL without credentials or parameters; keys come from the environment (api_key_variable)"
            )
        if not is_url:
            raise ValueError(f"expected a URL such as http://host:8000/v1, found {endpoint!r}")
        return endpoint.rstrip("/")

    @model_validator(mode="after")
    def _is_a_judge(self) -> JudgeConfig:
        if self.endpoint is not None and self.model is None:
            raise ValueError("endpoint needs model: the name by which the server knows the judge")
        if len(set(self.protocols)) < len(self.protocols):
            raise ValueError(f"protocols: expected each one once, found {', '.join(self.protocols)}")
        if self.has_own_engines and self.max_tokens >= self.max_model_len:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) leaves no room for a prompt in max_model_len ({self.max_model_len})"
            )
        return self
