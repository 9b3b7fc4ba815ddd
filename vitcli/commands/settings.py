"""`vitcli settings`: every setting of a recipe with type, default and meaning, from the schema."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from vitcli.config.schema import SECTIONS
from vitcli.errors import VitcliError, nearest, printable
from vitcli.train.build import registered_names

TYPES = {"integer": "int", "number": "float", "boolean": "bool", "string": "str"}
BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "from",
    "exclusiveMaximum": "below",
    "maximum": "up to",
}
# Values of which one fits any setting without a default.
EXAMPLES = (True, 0.1, 16, 1, "TEXT", "10m", [0.1], [16], [16, 16], [0.1, 0.9], [[16, 0.5]])


@dataclass(frozen=True)
class SettingRow:
    """One setting.

    Attributes:
        type: the type and bounds in words, or the allowed values.
        choices: the allowed names; empty if there is no fixed list.
        default: as it is written after `--set`; None if there is none.
        example: an argument of `--set`.
    """

    key: str
    type: str
    choices: tuple[Any, ...]
    default: str | None
    meaning: str
    example: str


@dataclass(frozen=True)
class SettingList:
    """Settings in the order of the schema; `exact` if one key was asked for."""

    rows: tuple[SettingRow, ...]
    exact: bool

    def to_json(self) -> list[dict[str, Any]]:
        """The JSON of `settings --json`."""
        return [asdict(row) for row in self.rows]


def run(words: Sequence[str] = ()) -> SettingList:
    """The settings whose key or meaning contains all `words`; a whole key gives only this one.

    Raises:
        VitcliError: there are none.
    """
    rows = tuple(setting_rows())
    if len(words) == 1 and (exact := [row for row in rows if row.key == words[0]]):
        return SettingList(tuple(exact), exact=True)
    lowered = [word.lower() for word in words]
    found = [r for r in rows if all(word in f"{r.key} {r.meaning}".lower() for word in lowered)]
    if not found:
        text = " ".join(words)
        close = nearest(text, [row.key for row in rows])
        raise VitcliError(
            f"no setting contains `{printable(text)}`",
            f"did you mean `{close}`?" if close else "`vitcli settings` lists all",
        )
    return SettingList(tuple(found), exact=False)


def setting_rows(sections: Sequence[str] = tuple(SECTIONS)) -> Iterator[SettingRow]:
    """The settings of these sections of the schema, in its order."""
    registered = registered_names()
    for name in sections:
        section = SECTIONS[name]
        nodes = section.model_json_schema()["properties"]
        for key, field in section.model_fields.items():
            node = nodes[key]
            if names := registered.get(f"{name}.{key}"):
                node = {**node, "enum": list(names)}
            yield SettingRow(
                key=f"{name}.{key}",
                type=_type(node),
                choices=_choices(node),
                default=None if field.default is None else _written(field.default),
                meaning=field.description or "",
                example=f"{name}.{key}={_written(_example(field, node))}",
            )


def _type(node: dict[str, Any]) -> str:
    """A type of JSON Schema in words: `float above 0`, `crop` or `pad`, list of int."""
    if choices := [*node.get("enum", []), *([node["const"]] if "const" in node else [])]:
        return " or ".join(f"`{_written(value)}`" for value in choices)
    if "anyOf" in node:
        parts = [_type(part) for part in node["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    if node.get("type") == "array":
        if items := node.get("prefixItems"):
            return f"list of {len(items)}: {', '.join(_type(item) for item in items)}"
        return f"list of {_type(node['items'])}"
    bounds = " ".join(f"{word} {node[key]:,.12g}" for key, word in BOUNDS.items() if key in node)
    # Two closed ends are a range: `from 0 to 1`.
    if "minimum" in node:
        bounds = bounds.replace("up to", "to")
    return f"{TYPES[node['type']]} {bounds}".strip()


def _choices(node: dict[str, Any]) -> tuple[Any, ...]:
    """The values that a schema lists, those of its alternatives included."""
    own = [*node.get("enum", []), *([node["const"]] if "const" in node else [])]
    return (*own, *(value for part in node.get("anyOf", []) for value in _choices(part)))


def _example(field: FieldInfo, node: dict[str, Any]) -> Any:
    """A value that the field accepts: another choice than the default, else the default."""
    default = field.default
    accepts: TypeAdapter[Any] = TypeAdapter(field.rebuild_annotation())
    choices = [value for value in _choices(node) if value != default]
    lists = [[value] for value in _choices(node.get("items", {}))]
    own = [not default] if isinstance(default, bool) else [default] if default else []
    for value in (*choices, *lists, *own, *EXAMPLES):
        try:
            # As JSON, a list is a tuple of the schema; `strict`, so that 0.1 is no string.
            accepts.validate_json(json.dumps(value), strict=True)
        except ValidationError:
            continue
        return value
    return default


def _written(value: Any) -> str:
    """A value as it is written after `--set KEY=`: TOML, and plain words."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
