"""Run directories for tests of the chat, with trained rounds and a model that passes the checks, and a served page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy
from safetensors.numpy import save_file

from mipo_ray.chat.page import ChatPage, served
from mipo_ray.config.recipe import load_config
from mipo_ray.storage.configuration import record_config
from mipo_ray.storage.run_directory import RunDirectory, open_run
from tests.helpers.stages import commit


def make_chat_run(directory: Path, trained: int, *overrides: str) -> RunDirectory:
    """A run with so many trained rounds, of a model whose weights nobody loads."""
    model = directory / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"weight": numpy.arange(12, dtype=numpy.float32)}, model / "model.safetensors")
    (model / "tokenizer.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    options = [f"run_dir={directory}/run", "rounds=3", f"model.path={model}", "model.max_model_len=256", *overrides]
    config = load_config(None, options)
    run = open_run(f"{directory}/run")
    record_config(run, config)
    for number in range(trained):
        commit(run, f"rounds/{number:03d}/train", config)
    return run


@contextlib.contextmanager
def running_page(page: ChatPage) -> Iterator[str]:
    """The page's server in a thread; gives its address."""
    started = threading.Event()
    found: list[str] = []
    stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        async with served(page, 0) as address:
            found.append(address)
            stop.append((asyncio.get_running_loop(), asyncio.Event()))
            started.set()
            await stop[0][1].wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield found[0]
    finally:
        loop, event = stop[0]
        loop.call_soon_threadsafe(event.set)
        thread.join(60)
        assert not thread.is_alive()
