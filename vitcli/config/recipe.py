"""Recipes: read TOML, apply overrides, check every setting, and list the recipes that are shipped.

Precedence: the defaults of the schema, the recipe file, then `--set section.key=value` and flags.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from vitcli.config.schema import (
    DURATIONS,
    SECTIONS,
    DataCheck,
    Inference,
    Recipe,
    Section,
    Settings,
)
from vitcli.errors import VitcliError, nearest, unknown
from vitcli.files import parse_toml

RECIPE_FOLDERS = (".", "paper", "reference")


def recipes_folder() -> Path:
    """The folder with the recipes of this installation."""
    package = Path(__file__).parents[1]
    inside = package / "_recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipe_files() -> dict[str, Path]:
    """Recipe name -> file: general recipes, the paper's, and reference implementations'."""
    folder = recipes_folder()
    paths = [p for part in RECIPE_FOLDERS for p in sorted((folder / part).glob("*.toml"))]
    return {path.stem: path for path in paths}


def recipe_path(name: str) -> Path:
    """The file of a recipe, given its name or its path.

    Raises:
        VitcliError: neither exists.
    """
    if name.endswith(".toml") or "/" in name:
        path = Path(name)
        if path.is_file():
            return path
        raise VitcliError(f"no recipe file `{name}`", "`vitcli recipes` lists the recipes")
    files = recipe_files()
    if name not in files:
        raise unknown("recipe", name, sorted(files))
    return files[name]


def read_toml(path: Path) -> Settings:
    """Read a TOML file.

    Raises:
        VitcliError: the file cannot be read or is not TOML; the error names the line.
    """
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise VitcliError(
            f"cannot read `{path}`: {why}", "a recipe is a TOML file in UTF-8"
        ) from None
    except ValueError as error:
        raise VitcliError(f"`{path}` is not TOML: {error}", "see `vitcli recipes NAME`") from None


def parse_overrides(assignments: Iterable[str]) -> Settings:
    """`["train.epochs=3", "preprocess.mean=[0.5,0.5,0.5]"]` -> nested settings.

    A value is parsed as TOML. A value that is not TOML is a string, so names need no quotes. A
    setting that takes strings only also takes `1` and `true` as names.

    Raises:
        VitcliError: an entry has no `=` or no section.
    """
    settings: Settings = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise VitcliError(
                f"`--set {text}` must have the form section.key=value",
                "for example `--set train.epochs=3`",
            )
        try:
            parsed: Any = parse_toml(f"value = {value}")["value"]
        except ValueError:
            parsed = value
        if not isinstance(parsed, str) and _takes_text_only(key.strip()):
            parsed = value.strip()
        lay_over(settings, nest(key.strip(), parsed))
    return settings


def _takes_text_only(key: str) -> bool:
    """True for a setting such as `data.label_column`, of type `str` or `str | None`."""
    section, _, name = key.partition(".")
    fields = SECTIONS[section].model_fields if section in SECTIONS else Recipe.model_fields
    field = fields.get(name if section in SECTIONS else key)
    kind = None if field is None else field.annotation
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return str in kinds and set(kinds) <= {str, NoneType}


def nest(key: str, value: Any) -> Settings:
    """`nest("train.epochs", 3)` -> `{"train": {"epochs": 3}}`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def lay_over(lower: Settings, upper: Mapping[str, Any]) -> None:
    """Merge `upper` into `lower` in place; `upper` wins.

    A run length in `upper` replaces every run length in `lower`. The same holds for the warm-up.
    """
    for key, value in upper.items():
        if isinstance(value, Mapping) and isinstance(lower.get(key), dict):
            for rivals in (DURATIONS, ("warmup_steps", "warmup_fraction")):
                if any(name in value for name in rivals):
                    for name in rivals:
                        lower[key].pop(name, None)
            lay_over(lower[key], value)
        else:
            lower[key] = dict(value) if isinstance(value, Mapping) else value


S = TypeVar("S", bound=Section)


def check(
    kind: type[S],
    settings: Mapping[str, Any],
    origin: str,
    hint: str = "",
    typed: Mapping[str, Any] | None = None,
) -> S:
    """Validate settings.

    Args:
        origin: the source of the settings, for an error.
        hint: what to do about an error.
        typed: the settings of the command line; an error in these does not name `origin`.

    Raises:
        VitcliError: one error that lists every mistake.
    """
    try:
        json.dumps(settings, default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise VitcliError(
            f"{origin}: it contains a name that is not UTF-8, which a recipe cannot store",
            "rename the file, or pass a link to it that has a UTF-8 name",
        ) from None
    if kind is Recipe and settings.get("command") == "fewshot":
        raise VitcliError(
            f"{origin} belongs to a few-shot run, which has no training settings",
            "give a run of `pretrain` or `finetune`",
        )
    try:
        # Validate from JSON: strict mode accepts a JSON array for a tuple, but not a Python list.
        return kind.model_validate_json(json.dumps(settings, default=str))
    except ValidationError as error:
        faults: dict[str, str] = {}
        for one in error.errors():  # each member of a union reports an error; keep the first
            faults.setdefault(*_fault(kind, dict(one)))
        if issubclass(kind, Inference):
            hint = f"the sections are `{'`, `'.join(kind.model_fields)}`"
        text = "; ".join(faults.values())
        if not faults.keys() <= flat_keys(typed or {}).keys():
            text = f"{origin}: {text}"
        elif kind is Recipe and (known := [k for k in faults if k in _dotted_names(kind)]):
            hint = f"`vitcli settings {known[0]}` explains it"  # the recipe has no part in it
        hint = hint or f"correct it in {origin}; `vitcli recipes pretrain_formula` is an example"
        raise VitcliError(text, hint) from None


def _fault(kind: type[Section], error: Mapping[str, Any]) -> tuple[str, str]:
    """The key of one pydantic error, and a sentence about the mistake."""
    parts = [str(part) for part in error["loc"]]
    names = _dotted_names(kind)
    while len(parts) > 1 and ".".join(parts) not in names and error["type"] != "extra_forbidden":
        parts.pop()  # pydantic appends the union member that it tried
    name = ".".join(parts)
    if error["type"] == "extra_forbidden":
        meant = _similar_settings(name, names)
        text = f"there is no setting `{name}`"
        return name, f"{text} (did you mean {meant}?)" if meant else text
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "missing":
        return name, f"`{name}` is missing"
    is_scalar = not isinstance(error["input"], Mapping)
    value = f"`{name}` = {error['input']!r}" if is_scalar else f"`{name}`"
    if error["type"] == "value_error":
        return name, f"{value}{' ' if is_scalar else ': '}{message}" if name else message
    message = re.sub(r"^Input should be", "must be", message)
    return name, f"{value} {message[:1].lower()}{message[1:]}"


def _similar_settings(name: str, names: Sequence[str]) -> str:
    """The settings that `name` may mean, in a row; `lr` means `optim.lr` rather than `lora`."""
    last = name.rpartition(".")[2]
    own = [known.rpartition(".")[2] for known in names]
    full = [known for known, one in zip(names, own, strict=True) if one == last]
    close = nearest(name, names) if "." in name else None
    close = close or nearest(last, own) or nearest(name, names)
    full = full or [known for known in names if close == known]
    full = full or [n for n, one in zip(names, own, strict=True) if one == close][:1]
    return " or ".join(f"`{one}`" for one in full[:3])


def _dotted_names(kind: type[Section], prefix: str = "") -> list[str]:
    """The dotted names of all settings, such as `train.epochs`."""
    names = []
    for name, field in kind.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            names += _dotted_names(field.annotation, f"{prefix}{name}.")
    return names


def load_recipe(
    name: str, overrides: Mapping[str, Any] | None = None, command: str | None = None
) -> Recipe:
    """Load the recipe `name` (a shipped recipe or a file) and apply `overrides`.

    Raises:
        VitcliError: the recipe does not exist, is not TOML, has invalid settings, or belongs to
            another `command`.
    """
    path = recipe_path(name)
    settings = read_toml(path)
    lay_over(settings, overrides or {})
    origin = f"recipe `{name}`"
    hint = f"`vitcli recipes {name}` prints the recipe with its settings"
    recipe = check(Recipe, settings, origin, hint, overrides)
    if command is not None and recipe.command != command:
        right = f"vitcli {recipe.command}"
        raise VitcliError(f"recipe `{name}` is for `{right}`", f"run `{right} --recipe {name}`")
    return recipe


def load_inference(overrides: Mapping[str, Any] | None = None) -> Inference:
    """The settings of a command that does not train."""
    return check(Inference, overrides or {}, "--set", typed=overrides)


def load_data_check(overrides: Mapping[str, Any] | None = None) -> DataCheck:
    """The settings of `check`."""
    return check(DataCheck, overrides or {}, "--set", typed=overrides)


def differing_keys(one: Recipe, other: Recipe) -> list[str]:
    """Dotted names of the settings in which two recipes differ, without the description."""
    a, b = flat_settings(one), flat_settings(other)
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def flat_settings(recipe: Recipe) -> dict[str, Any]:
    """Dotted name -> plain value of every setting except the description."""
    return flat_keys(recipe.model_dump(mode="json", exclude={"description"}))


def flat_keys(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of nested settings."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flat_keys(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def header(text: str) -> dict[str, str]:
    """First line of `Follows`, `Run`, `Data` and so on in the comment at the top of a recipe."""
    top = text.partition("\ncommand")[0]
    found = re.findall(r"^# (Follows|Run|Data|Cost|Expect|Then): +(.+)$", top, flags=re.MULTILINE)
    return dict(found)
