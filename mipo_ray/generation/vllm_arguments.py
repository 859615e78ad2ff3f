"""What every vLLM engine of this project is started with: environment and arguments, for GPUs and for CPUs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from shutil import which
from typing import Any, NoReturn

from mipo_ray.config.prompts import ChatSettings
from mipo_ray.config.schema import Config
from mipo_ray.monitoring.metrics import ascii_label
from mipo_ray.paths import plain_path
from mipo_ray.ray_cluster.resources import Resources

# What vLLM would compile with nvcc as an engine starts, whether there is one or not, and what it does without: its own
# sampler (which it uses anyhow for requests with a seed, as all are here), NCCL's and its own all-reduce, and Triton's
# and CUTLASS' products of FP8 weights.
_COMPILED_BY_NVCC = ("VLLM_USE_FLASHINFER_SAMPLER", "VLLM_ALLREDUCE_USE_FLASHINFER", "VLLM_USE_DEEP_GEMM")


@dataclass(frozen=True)
class EngineSettings:
    """What the actors of a pool need to know of their model and of where they run; `max_model_len` is in tokens.

    engine_args: raw vLLM engine arguments of the configuration. chat: how conversations become token ids.
    thought_marks: the configuration's `model.thought_marks`. probe_logprobs: what the engine must give for the probe
    sequences, where the trainer noted it (nats; see `models.probes`). stall_minutes: the configuration's
    `generation.stall_minutes`.
    """

    model_path: str
    dtype: str
    max_model_len: int
    trust_remote_code: bool
    tensor_parallel_size: int
    on_gpu: bool
    engine_args: dict[str, Any]
    chat: ChatSettings
    thought_marks: tuple[tuple[str, str], ...] = ()
    probe_logprobs: tuple[float, ...] | None = None
    stall_minutes: float | None = None


def engine_settings(config: Config, model_path: str, resources: Resources) -> EngineSettings:
    """The settings of a pool of engines for one model."""
    return EngineSettings(
        model_path=model_path,
        dtype=resources.dtype,
        max_model_len=config.model.max_model_len,
        trust_remote_code=config.model.trust_remote_code,
        tensor_parallel_size=config.generation.pool.tensor_parallel_size,
        on_gpu=resources.on_gpu,
        engine_args=config.generation.pool.engine_args,
        chat=config.prompts.chat,
        thought_marks=config.model.thought_marks or (),
        stall_minutes=config.generation.stall_minutes,
    )


def set_environment(on_gpu: bool) -> None:
    """Sets the environment variables that vLLM reads; call it in the actor before anything imports vllm."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if on_gpu:
        for variable in _COMPILED_BY_NVCC:
            os.environ.setdefault(variable, "0")
    else:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        # vLLM keeps one core free for a web server that is not there: with two cores that halves the speed.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())  # Ray set it from the actor's logical CPUs


def engine_arguments(model: str, settings: EngineSettings) -> dict[str, Any]:
    """The keyword arguments of `AsyncEngineArgs` that sampling and embedding engines share.

    `model` is what vLLM loads: a directory on this machine or a Hugging Face id.
    """
    path, label = plain_path(model), ascii_label(model)
    arguments: dict[str, Any] = {
        "model": path,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "trust_remote_code": settings.trust_remote_code,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if label != path:
        arguments["served_model_name"] = label  # the label of its metrics, which Ray takes in ASCII alone
    if settings.tensor_parallel_size > 1:
        # With the ray executor Ray Data would leak the engine's placement groups until the driver exits.
        arguments["distributed_executor_backend"] = "mp"
    elif not settings.on_gpu:
        # Named by its path, because vLLM turns "uni" into "mp" on a CPU in order to bind OpenMP threads to cores.
        # One process less starts 5 s sooner, and `set_environment` gives it all cores.
        arguments["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    if settings.on_gpu:
        arguments |= _attention_without_nvcc(settings)
    else:
        # Compilation costs minutes for a few per cent, and seeds fail when a prompt is prefilled in chunks.
        arguments |= {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(settings.max_model_len, 2048),
        }
    return arguments


def _attention_without_nvcc(settings: EngineSettings) -> dict[str, Any]:
    """Another attention than FlashInfer's where vLLM would take that one first (data-centre Blackwell) and nothing on
    this node can compile it. An attention that the configuration names stays."""
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    prefers_flashinfer = capability is not None and capability.major == 10 and settings.dtype == "bfloat16"
    is_named = {"attention_backend", "attention_config"} & settings.engine_args.keys()
    return {"attention_backend": "FLASH_ATTN"} if prefers_flashinfer and not is_named and not which("nvcc") else {}


def stat_loggers(stepped: Callable[[], None]) -> list[Any]:
    """For `AsyncLLM.from_engine_args`: `stepped` is called at each step of the engine, and vLLM's own gauges and
    counters are Ray metrics, `ray_vllm_...` at Ray's endpoint.

    Given alone, they do not turn on vLLM's log lines (`disable_log_stats` stays true). Its histograms (latencies of
    single requests) are left out: they are nine tenths of an engine's 280 series, and Ray's endpoint keeps counters and
    histograms of every engine that ever ran on a node until the cluster ends.
    """
    import ray.util.metrics
    from vllm.v1.metrics import loggers, ray_wrappers

    # vLLM takes Ray's metrics for missing where Ray Serve cannot be imported, of which it needs nothing here.
    ray_wrappers.ray_metrics = ray.util.metrics

    class GaugesAndCounters(ray_wrappers.RayPrometheusStatLogger):
        _histogram_cls = _NoHistogram  # type: ignore[assignment]

    class Steps(loggers.StatLoggerBase):
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def record(self, *_: Any, **__: Any) -> None:
            stepped()

        def log_engine_initialized(self) -> None: ...

    return [GaugesAndCounters, Steps]


class _NoHistogram:
    """Takes the place of vLLM's histograms and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def labels(self, *_: Any, **__: Any) -> _NoHistogram:
        return self

    def observe(self, _: float) -> None: ...


class EngineStalled(RuntimeError):
    """An engine that has requests and does no step any more."""


def is_dead_engine(error: BaseException) -> bool:
    """Whether `error` says that the engine's process is gone or does nothing any more, so that its actor is of no
    use."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError | EngineStalled)


def end_with_engine() -> NoReturn:
    """Ends this process, an actor whose engine is of no use any more, as a system error, after which alone Ray starts
    an actor again elsewhere; and the engine's process, which may only stand still, and would keep its GPU."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(1)
