"""The JSON Schema of a configuration file, by which editors complete and underline."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

_REFERENCE = {"type": "string", "pattern": r"\$\{env:"}


def file_schema(cls: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema (2020-12) of the files that `parse_args(cls, ...)` reads.

    Nothing is required, since a parent file or the command line may give it; every value may be `${env:NAME}`.
    """
    schema = cls.model_json_schema()
    for section in (schema, *schema.get("$defs", {}).values()):
        section.pop("required", None)
        section.pop("title", None)
        section["properties"] = {name: _or_reference(value) for name, value in section["properties"].items()}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "Another file, relative to this one, whose values count where this one gives none.",
    }
    return schema


def _or_reference(value: dict[str, Any]) -> dict[str, Any]:
    """`value`, or text with an environment reference in it; a section stays as it is, except that it may be empty."""
    value.pop("title", None)
    if "$ref" in value:
        return {"anyOf": [value, {"type": "null"}]}
    notes: dict[str, Any] = {key: value.pop(key) for key in ("description", "default", "legacy") if key in value}
    if "legacy" in notes:
        notes["deprecated"] = True
        notes["description"] += f" No effect: {notes.pop('legacy')}."
    if value.get("type") == "string" and len(value) == 1:
        return value | notes
    return {"anyOf": [*value.pop("anyOf", [value] if value else [{}]), _REFERENCE]} | notes
