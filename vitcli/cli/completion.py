"""Shell completion: recipes, runs, public models and `--set` keys; it loads no torch.

Where nothing fits, the shell completes file names.
"""

from collections.abc import Iterable

Candidates = list[tuple[str, str]]  # (word, its help)


def _starting(incomplete: str, words: Iterable[tuple[str, str]]) -> Candidates:
    return [(word, text) for word, text in words if word.startswith(incomplete)]


def complete_recipe(incomplete: str) -> Candidates:
    """Names of recipes."""
    from vitcli.config.recipe import recipe_files

    return _starting(incomplete, ((name, "recipe") for name in recipe_files()))


def complete_run(incomplete: str) -> Candidates:
    """Run directories under `runs/`."""
    from vitcli.run import RUNS

    found = sorted(RUNS.glob("*/recipe.toml"))
    return _starting(incomplete, ((path.parent.as_posix(), "run") for path in found))


def complete_model(incomplete: str) -> Candidates:
    """Run directories and public models: short names, or names of timm and the Hub."""
    from vitcli.weights.public import TIMM, public_models

    rows = public_models().values()
    names = [(row.name, row.facts.title) for row in rows]
    if incomplete:  # the long names would hide the short ones
        names += [(row.model, row.name) for row in rows]
        names += [(row.model.removeprefix(TIMM), row.name) for row in rows]
    # A row that is not on timm's account has one long name.
    return [*complete_run(incomplete), *dict(_starting(incomplete, names)).items()]


def complete_model_word(incomplete: str) -> Candidates:
    """The arguments of `vitcli models`."""
    return [*_starting(incomplete, [("fetch", "download weights")]), *complete_model(incomplete)]


def complete_recipe_or_run(incomplete: str) -> Candidates:
    """The first argument of `vitcli plan`."""
    return [*complete_recipe(incomplete), *complete_run(incomplete)]


def _keys() -> Candidates:
    from vitcli.config.schema import SECTIONS

    return [
        (f"{name}.{key}", field.description or "")
        for name, section in SECTIONS.items()
        for key, field in section.model_fields.items()
    ]


def complete_key(incomplete: str) -> Candidates:
    """Keys of the schema."""
    return _starting(incomplete, _keys())


def complete_assignment(incomplete: str) -> Candidates:
    """`KEY=` for `--set`."""
    return [(f"{key}=", text) for key, text in complete_key(incomplete)]
