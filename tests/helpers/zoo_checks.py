"""What the zoo's tests share: a member's log-probs by everything here that scores, beside those of vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mipo_ray.config.train import TrainConfig
from mipo_ray.errors import UserError
from mipo_ray.models.directory import open_directory, weight_files
from mipo_ray.models.policy_check import check_policy
from mipo_ray.training.attention import use_attention
from mipo_ray.training.export import export_policy
from mipo_ray.training.layout import lay_out
from mipo_ray.training.logprobs import ResponseLogprobs, check_logprobs, response_logprobs
from mipo_ray.training.trainable import check_trainable
from tests.helpers.model_zoo import WINDOW, ZOO, engine_logprobs, make_member, sequences
from tests.helpers.tiny_families import sequence_trees

LAYOUTS = ("padded", "packed", "shared")
# Nats of a whole response, in float32; the run's own bound (`training.agreement`) is ten times that and more.
CLOSE = 2e-3


def make_and_ask(names: list[str], directory: Path) -> dict[str, tuple[Path, Any]]:
    """Each member as a directory, exported once, with what vLLM says of the export; None for those that are refused."""
    exports = {}
    for number, name in enumerate(names):
        source, export = directory / f"{number:02d}", directory / f"{number:02d}-exported"
        source.mkdir()
        export_policy(make_member(name, source), source, export)
        exports[name] = export
    asked = [export for name, export in exports.items() if ZOO[name].refused is None]
    said = engine_logprobs(asked, directory / "said.jsonl")
    return {name: (export, said.get(export)) for name, export in exports.items()}


def check_member(name: str, export: Path, said: Any) -> None:
    """Everything that scores agrees with vLLM, or the member is refused by name; a layout may be refused alone."""
    from transformers import AutoModelForCausalLM

    directory = open_directory(str(export))
    refused = ZOO[name].refused
    if refused is not None:
        with pytest.raises(UserError, match=refused):
            check_policy(directory, weight_files(directory), {"model.max_model_len": WINDOW})
        return
    check_policy(directory, weight_files(directory), {"model.max_model_len": WINDOW})
    assert isinstance(said, list), said
    found: dict[str, list[float]] = {}
    refusals = {}
    for layout in LAYOUTS:
        model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
        try:
            check_trainable(str(export), TrainConfig(layout=layout), trust_remote_code=False)  # type: ignore[arg-type]
            use_attention(model, "sdpa", layout)  # type: ignore[arg-type]
            check_logprobs(model, layout, "cpu")  # type: ignore[arg-type]
        except UserError as error:
            refusals[layout] = str(error)
            continue
        with torch.no_grad():
            batch = lay_out(sequence_trees(sequences()), layout)  # type: ignore[arg-type]
            found[layout] = ResponseLogprobs(model)(batch).tolist()
    assert "padded" in found, refusals
    assert all(type(model).__name__ in refusal for refusal in refusals.values()), refusals
    scorer = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    with torch.inference_mode():  # as the scorer does it, one sequence at a time
        one_by_one = [response_logprobs(scorer, lay_out([tree], "padded")) for tree in sequence_trees(sequences())]
    found["scorer"] = torch.cat(one_by_one).tolist()
    for way, logprobs in found.items():
        assert logprobs == pytest.approx(said, abs=CLOSE, rel=0), way
