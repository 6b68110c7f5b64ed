"""The JSON Schema of a configuration file, by which editors complete and underline."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

# what the loader takes beside the value itself
_WORDS = {"type": "string", "pattern": "^([Yy]es|YES|[Nn]o|NO|[Oo]n|ON|[Oo]ff|OFF|[Tt]rue|TRUE|[Ff]alse|FALSE|0|1)$"}
_QUOTED = {"type": "string", "pattern": r"^[-+]?[0-9_]*\.?[0-9_]+\.?([eE][-+]?[0-9]+)?$"}
_BESIDE: dict[str, list[dict[str, Any]]] = {
    "boolean": [_WORDS, {"enum": [0, 1]}],
    "integer": [_QUOTED],
    "number": [_QUOTED],
}
_REFERENCE = {"type": "string", "pattern": r"\$\{env:"}


def file_schema(cls: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema (2020-12) of the files that `parse_args(cls, ...)` reads.

    Nothing is required, since a parent file or the command line may give it; every value may be `${env:NAME}`.
    """
    schema = cls.model_json_schema()
    definitions = schema.get("$defs", {})
    sections = {f"#/$defs/{name}" for name, definition in definitions.items() if "properties" in definition}
    for section in (schema, *definitions.values()):
        section.pop("required", None)
        section.pop("title", None)
        if "properties" in section:  # not an enumeration
            section["properties"] = {
                name: _or_reference(value, sections) for name, value in section["properties"].items()
            }
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "Another file, relative to this one, whose values count where this one gives none.",
    }
    return schema


def _or_reference(value: dict[str, Any], sections: set[str]) -> dict[str, Any]:
    """`value`, or text with an environment reference in it; one of `sections` stays as it is, but may be empty."""
    value.pop("title", None)
    if value.get("$ref") in sections:
        return {"anyOf": [value, {"type": "null"}]}
    notes: dict[str, Any] = {key: value.pop(key) for key in ("description", "default", "legacy") if key in value}
    if "legacy" in notes:
        notes["deprecated"] = True
        notes["description"] += f" No effect: {notes.pop('legacy')}."
    if value.get("type") == "string" and len(value) == 1:
        return value | notes
    kinds = value.pop("anyOf", [value] if value else [{}])
    beside = [each for kind in kinds for each in _BESIDE.get(kind.get("type", ""), ())]
    return {"anyOf": [*kinds, *beside, _REFERENCE]} | notes
