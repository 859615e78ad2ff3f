"""One trainer in a process of its own, told through pipes what to do: TRL's DPOTrainer, or ours.

    python -m benchmarks.trainer_contestants

reads one JSON object per line from standard input and answers each with one line. The first is a `Specification`; the
others are {"do": NAME OF A METHOD OF Contestant, and its arguments}. What libraries print goes to standard error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-6
BETA = 0.1
ADAM_BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0

Step = Callable[[list[dict[str, Any]]], dict[str, float]]


@dataclass(frozen=True)
class Specification:
    """A trainer and how it runs."""

    trainer: str  # "trl" or "ours"
    model: str  # directory
    device: str  # "cpu" or "cuda"
    dtype: str  # of computations: "float32" or "bfloat16"
    threads: int
    reference_mode: str  # "colocated", "cached", or, of ours, "adapter"
    options: dict[str, Any] = field(
        default_factory=dict
    )  # of TrainConfig; TRL: weights_dtype, torch_compile, gradient_checkpointing
    known: list[list[dict[str, Any]]] = field(default_factory=list)  # cached: the steps' pairs to compute first


class Contestant:
    """A loaded trainer, which takes steps. Memory counts from its last `forget_memory`."""

    def __init__(self, specification: Specification) -> None:
        import torch

        self.device = specification.device
        torch.set_num_threads(specification.threads)
        torch.manual_seed(0)
        self.take_step, self.engine = {"trl": _trl, "ours": _ours}[specification.trainer](specification)
        self.forget_memory()

    def step(self, pairs: list[dict[str, Any]]) -> dict[str, float]:
        """One optimizer step: its seconds, loss and, of ours, padding_share."""
        started = self._clock()
        found = self.take_step(pairs)
        return {"seconds": self._clock() - started, **found}

    def parameters(self) -> dict[str, int]:
        """How many the model has; at ZeRO 3, too, where this process holds a part of each."""
        sizes = (getattr(parameter, "ds_numel", parameter.numel()) for parameter in self._model().parameters())
        return {"parameters": sum(sizes)}

    def save(self, directory: str) -> dict[str, int]:
        """Ours: writes a checkpoint; its bytes."""
        from mipo_ray.training.checkpoint import Progress, save_checkpoint

        save_checkpoint(self.engine, Path(directory), Progress())
        return {"bytes": sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())}

    def load(self, directory: str) -> dict[str, int]:
        """Ours: goes on from a checkpoint."""
        from mipo_ray.training.checkpoint import load_checkpoint

        return {"steps": load_checkpoint(self.engine, Path(directory)).steps}

    def _model(self) -> Any:
        return getattr(self.engine, "module", self.engine)

    def count_flops(self, pairs: list[dict[str, Any]]) -> dict[str, int]:
        """FLOPs of one more step."""
        from mipo_ray.training.profile import count_flops

        return {"flops": count_flops(lambda: self.take_step(pairs))}

    def forward_backward(self, pairs: list[dict[str, Any]]) -> dict[str, int]:
        """Ours: forward and backward without an update; bytes kept for backward, and tokens of the forward pass."""
        import torch

        batch = _laid_out(pairs).to(self.device)
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.engine.module.parameters()}
        kept: dict[int, int] = {}

        def see(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            logprobs = self.engine(batch)
        self.engine.backward(logprobs.sum(), scale_wrt_gas=False)
        return {"kept_bytes": sum(kept.values()), "forward_tokens": batch.input_ids.numel()}

    def forget_memory(self) -> dict[str, int]:
        """Starts the peak anew; the bytes that are held now."""
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak of the resident memory
            self.held = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {"held_bytes": self.held}

    def memory(self) -> dict[str, int]:
        """Bytes: the peak since `forget_memory`, and how much above what was held then."""
        from mipo_ray.training.profile import peak_memory

        peak = peak_memory(self.device)
        return {"peak_bytes": peak, "grown_bytes": peak - self.held}

    def _clock(self) -> float:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()


def _ours(specification: Specification) -> tuple[Step, Any]:
    from mipo_ray.config.train import TrainConfig
    from mipo_ray.training.deepspeed_engine import join_process_group, policy_and_reference, quiet_libraries
    from mipo_ray.training.layout import read_pair
    from mipo_ray.training.step import optimizer_step

    train = TrainConfig.model_validate(
        {
            "learning_rate": LEARNING_RATE,
            "beta": BETA,
            "adam_betas": ADAM_BETAS,
            "max_grad_norm": MAX_GRAD_NORM,
            "reference_mode": specification.reference_mode,
            "zero_stage": 0,
            "micro_batch_tokens": 2**30,  # a step is one forward pass, as TRL's
            **specification.options,
        }
    )
    quiet_libraries(specification.device)
    join_process_group(specification.device)
    known = [[read_pair(pair, train.objective) for pair in pairs] for pairs in specification.known]
    engine, reference = policy_and_reference(
        specification.model,
        specification.model,
        train,
        specification.dtype,
        specification.device,
        trust_remote_code=False,
        steps=lambda: known,
        pair_count=sum(map(len, known)),
        cache=None,
    )

    def step(pairs: list[dict[str, Any]]) -> dict[str, float]:
        read = [read_pair(pair, train.objective) for pair in pairs]
        metrics = optimizer_step(engine, reference, read, train, train.learning_rate, 0)
        return {name: metrics[name] for name in ("loss", "padding_share", "forward_tokens")}

    return step, engine


def _trl(specification: Specification) -> tuple[Step, Any]:
    """A step as `Trainer.train` makes it: collator, training_step, clipping, optimizer, gradients set to zero."""
    trainer = _trl_trainer(specification)
    trainer.create_optimizer()
    model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    cached: dict[str, dict[str, float]] = {}

    def batch(pairs: list[dict[str, Any]]) -> Any:
        return trainer.data_collator(
            [
                {
                    "prompt_ids": pair["prompt_token_ids"],
                    "chosen_ids": pair["chosen_token_ids"],
                    "rejected_ids": pair["rejected_token_ids"][0],
                    **cached.get(pair["pair_id"], {}),
                }
                for pair in pairs
            ]
        )

    for pairs in specification.known if specification.reference_mode == "cached" else []:
        found = trainer.compute_ref_log_probs(model, trainer._prepare_inputs(batch(pairs)))
        for pair, chosen, rejected in zip(pairs, *(values.tolist() for values in found), strict=True):
            cached[pair["pair_id"]] = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def step(pairs: list[dict[str, Any]]) -> dict[str, float]:
        loss = trainer.training_step(model, batch(pairs))
        trainer._clip_grad_norm(model)
        trainer.optimizer.step()
        model.zero_grad()
        return {"loss": loss.item()}

    return step, model


def _trl_trainer(specification: Specification) -> Any:
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    weights_dtype = getattr(torch, specification.options.get("weights_dtype", "float32"))

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(specification.model, dtype=weights_dtype, use_safetensors=True)
        if specification.options.get("torch_compile"):
            from mipo_ray.training.deepspeed_engine import compile_layers

            compile_layers(model)
        return model

    # The trainer insists on text. Pairs of token ids go to its collator directly.
    tokenizer = Tokenizer(models.WordLevel({"word": 0, "<end>": 1, "<unknown>": 2}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    is_cached = specification.reference_mode == "cached"
    return DPOTrainer(
        model=load(),
        ref_model=None if is_cached else load(),
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(prefix="trl-"),
            beta=BETA,
            learning_rate=LEARNING_RATE,
            adam_beta1=ADAM_BETAS[0],
            adam_beta2=ADAM_BETAS[1],
            max_grad_norm=MAX_GRAD_NORM,
            optim="adamw_torch_fused",
            precompute_ref_log_probs=is_cached,
            use_cpu=specification.device == "cpu",
            # With bf16, weights in float32 are cast as they are used; weights in bfloat16 are what they are.
            bf16=specification.dtype == "bfloat16" and weights_dtype == torch.float32,
            max_length=None,
            gradient_checkpointing=specification.options.get("gradient_checkpointing", False),
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "word word", "chosen": " word", "rejected": " <unknown>"}]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>"),
    )


def _laid_out(pairs: list[dict[str, Any]]) -> Any:
    from mipo_ray.training.layout import lay_out, read_pair

    return lay_out([tree for pair in pairs for tree in read_pair(pair, "dpo").trees], "shared")


def main() -> None:
    # Libraries print to file descriptor 1 as they like; the answers need it for themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    specification = Specification(**json.loads(sys.stdin.readline()))
    contestant = Contestant(specification)
    print(json.dumps({"ready": asdict(specification)["trainer"]}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(contestant, request.pop("do"))(**request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
