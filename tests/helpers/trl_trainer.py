"""TRL's DPOTrainer as an independent implementation: around two tiny models, for batches of token ids."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any


def trl_dpo_trainer(policy: Any, reference: Any, *, vocabulary: int, beta: float, directory: Path) -> Any:
    """A trainer around copies of both models, since it patches the models that it is given.

    It insists on text and a tokenizer; what is compared goes to its collator as ids.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = {f"w{index}": index for index in range(vocabulary - 2)}
    words |= {"<end>": vocabulary - 2, "<unknown>": vocabulary - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return DPOTrainer(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        args=DPOConfig(
            output_dir=str(directory),
            beta=beta,
            use_cpu=True,
            bf16=False,
            report_to=[],
            max_length=None,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "w1 w2", "chosen": " w3", "rejected": " w4"}]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>"),
    )
