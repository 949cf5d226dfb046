"""Where the units of an experiment run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator

from backmerge.config import Settings


class ExecutionSettings(Settings):
    """Where work runs; no result depends on it."""

    executor: Literal["in-process", "pool", "ray"] = Field(
        "in-process", description="In this process, in a pool of processes of this machine, or on a Ray cluster."
    )
    num_workers: PositiveInt | None = Field(
        None, description="Processes of the pool; by default as many as the GPUs suffice for, without any GPU one."
    )
    num_gpus: NonNegativeFloat | None = Field(
        None, description="GPUs of one unit: 0.5 lets two share one. By default 1 where there are any, else 0."
    )
    num_cpus: NonNegativeFloat = Field(1, description="CPU cores that Ray reserves for one unit.")
    ray_address: str | None = Field(
        None, description="The cluster, such as ray-head:6379 or ray://host:10001; by default as ray.init() finds it."
    )
    ray_runtime_env: dict[str, Any] = Field(
        default_factory=dict, description="Passed to ray.init, such as {working_dir: .} to ship code of your own."
    )
    retries: NonNegativeInt = Field(2, description="How often a unit is done again whose worker or node died.")

    @field_validator("num_gpus")
    @classmethod
    def _whole_above_one(cls, num_gpus: float | None) -> float | None:
        if num_gpus is not None and num_gpus > 1 and num_gpus != int(num_gpus):
            raise ValueError("a unit takes a part of one GPU, or a whole number of them")
        return num_gpus
