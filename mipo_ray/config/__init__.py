"""The typed configuration, one module for each section; recipes and overrides. No torch, ray or vllm."""

from mipo_ray.config.recipe import load_config
from mipo_ray.config.schema import Config

__all__ = ["Config", "load_config"]
