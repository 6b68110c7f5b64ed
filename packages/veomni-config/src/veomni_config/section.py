"""What every section is: typed, frozen, closed to unknown keys, and aware of the rules between its keys."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from types import FunctionType
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, model_validator

SectionT = TypeVar("SectionT", bound="Section")
RuleT = TypeVar("RuleT", bound=Callable[[Any], str | None])

RULES_LATER = {"rules": "later"}  # validation context of parse_args, which tells all broken rules at once

# the reference system's files may write null for these
Names: TypeAlias = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: () if value is None else value, json_schema_input_type=tuple[str, ...] | None),
]
Switch: TypeAlias = Annotated[
    bool, BeforeValidator(lambda value: False if value is None else value, json_schema_input_type=bool | None)
]
AnyKeys: TypeAlias = Annotated[
    dict[str, Any],
    BeforeValidator(lambda value: {} if value is None else value, json_schema_input_type=dict[str, Any] | None),
]


def rule(*keys: str) -> Callable[[RuleT], RuleT]:
    """Mark a method of a section as a rule between its `keys` (dotted where they lie deeper).

    The method returns one sentence that says what is wrong and which value would be right, or None. It is called when
    all of `keys` are valid by themselves; the message shows their values and where each was written.
    """

    def mark(method: RuleT) -> RuleT:
        method.__dict__["rule_keys"] = keys
        return method

    return mark


class Section(BaseModel):
    """Base of all sections, and of the recipe that holds them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for name, field in cls.model_fields.items():
            if field.alias or field.validation_alias or field.serialization_alias:
                raise TypeError(f"{cls.__name__}.{name}: a key has one name, that of its field: leave out the alias")

    def derive(self) -> dict[str, Any]:
        """Values that follow from other keys, for keys that were left open; a subclass adds to those of its base."""
        return {}

    def broken_rules(self, ignore: Collection[str] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
        """The keys and the sentence of each broken rule, without the rules that read a key of `ignore`."""
        methods: dict[str, Any] = {}
        for cls in reversed(type(self).__mro__):
            methods |= vars(cls)
        for method in methods.values():
            keys = getattr(method, "rule_keys", None) if isinstance(method, FunctionType) else None
            if keys and not any(touches(key, bad) for key in keys for bad in ignore):
                sentence = method(self)
                if sentence:
                    yield keys, sentence

    @model_validator(mode="after")
    def _fill_and_check(self, info: ValidationInfo) -> Section:
        self.__dict__.update(self.derive())
        if info.context is not RULES_LATER:
            broken = [f"{', '.join(keys)}: {sentence}" for keys, sentence in self.broken_rules()]
            if broken:
                raise ValueError("\n".join(broken))
        return self


def touches(key: str, bad: str) -> bool:
    """Whether one of two dotted keys is the other or lies in it."""
    return key == bad or key.startswith(bad + ".") or bad.startswith(key + ".")
