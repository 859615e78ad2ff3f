"""config.yaml of a run directory: the configuration that its work stands under, and which other may go on with it."""

from __future__ import annotations

import yaml

from mipo_ray.config.recipe import result_fields, to_yaml
from mipo_ray.config.schema import Config
from mipo_ray.config.yaml_text import load_yaml
from mipo_ray.errors import brief, cut, few
from mipo_ray.storage.run_directory import LOGS, PROBE, WRITING, RunDirectory, StorageError


def record_config(run: RunDirectory, config: Config) -> None:
    """Writes config.yaml; refuses when finished work stands under a configuration with other results."""
    check_config(run, config)
    run.write_text("config.yaml", to_yaml(config))


def check_config(run: RunDirectory, config: Config) -> None:
    """Raises StorageError, with the difference, when the directory belongs to a run with other results.

    A field that the version which began the run did not have counts as its default.
    """
    text = run.read_text("config.yaml")
    if text is None:
        # A kill or a full disk may have left a probe or an unfinished write, and a refusal what libraries printed.
        own = ("lock", PROBE, f"{LOGS}/")
        if any(not name.startswith(own) and not name.endswith(WRITING) for name in run.list_files("")):
            raise StorageError(
                f"{run.url}: not empty and without a config.yaml, so not a run directory; choose another run_dir"
            )
        return
    try:
        defaults = result_fields(Config().model_dump(mode="json"))
        recorded = load_yaml(text)
        before = defaults | result_fields(recorded)
        named = recorded.get("evaluate", {}).get("primary")
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        raise StorageError(
            f"{run.path('config.yaml')}: expected the configuration of a run, found something else: {error}"
        ) from None
    after = result_fields(config.model_dump(mode="json"))
    changes = [
        f"  {cut(str(key))}: {brief(before.get(key, 'absent'))} there, {brief(after.get(key, 'absent'))} now"
        for key in sorted({*before, *after}, key=str)
        if before.get(key) != after.get(key)
    ]
    # It may be named late, by a run that an earlier version began, but not changed once there is work.
    if named is not None and config.evaluate.primary not in (None, named):
        changes.append(f"  evaluate.primary: {brief(named)} there, {brief(config.evaluate.primary)} now")
    if changes and _has_work(run):
        raise StorageError(
            f"{run.url}: this run directory holds work of another configuration. Use another run_dir, or set "
            "these back:\n" + few(changes, str)
        )


def _has_work(run: RunDirectory) -> bool:
    return any(name.startswith(("rounds/", "base/")) for name in run.list_files(""))
