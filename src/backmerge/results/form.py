"""Read the parts of results from JSON and write them to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import CoreSchema, core_schema

from backmerge.records import Estimate
from backmerge.statistics import PairedDifference


@dataclass(frozen=True)
class AsTable:
    """Reads a type from a JSON object and writes it as one, where pydantic would use a list or other keys.

    Attributes:
        written: The form of the JSON object.
        read: Returns the type's arguments from that object; unknown keys are ignored.
    """

    written: Callable[[Any], Mapping[str, Any]]
    read: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], CoreSchema]) -> CoreSchema:
        """Wrap the type's schema, as pydantic requires of annotations."""
        return core_schema.no_info_before_validator_function(
            lambda value: self.read(source, value) if isinstance(value, Mapping) else value,
            handler(source),
            serialization=core_schema.plain_serializer_function_ser_schema(self.written),
        )


TABLE = AsTable(
    lambda value: value._asdict(), lambda kind, table: {key: table[key] for key in kind._fields if key in table}
)
LEVEL = AsTable(
    lambda value: {"mean": value.value, "low": value.low, "high": value.high},
    lambda _, table: {"value": table.get("mean"), "low": table.get("low"), "high": table.get("high")},
)

Difference = Annotated[PairedDifference, TABLE]
Level = Annotated[Estimate, LEVEL]  # a mean over benchmarks


class Part(BaseModel):
    """A frozen part of the results; keys of later versions are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    def plain(self) -> dict[str, Any]:
        """Return the part as plain data: mappings, lists and scalars."""
        return self.model_dump(mode="json")
