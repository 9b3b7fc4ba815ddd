"""Who may import whom, from the code's own imports; and what must not be loaded early."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vitcli"

# From left to right; a module imports from its own package and from what stands to its right.
# Every package and every top-level module has a rank of its own, so no two can import each other.
ORDER = (
    "__main__",
    "cli",
    "commands",
    "cost",
    "inspection",
    "train",
    "evals",
    "weights",
    "data",
    "report",
    "run",
    "preprocess",
    "hub",
    "decode",
    "dicom",
    "pixels",
    "devices",
    "distributed",
    "malloc",
    "vit",
    "config",
    "progress",
    "files",
    "errors",
)
RANK = {name: number for number, name in enumerate(ORDER)}
HEAVY = {"torch", "datasets", "accelerate", "transformers", "timm", "torchvision"}
ORACLES = {"transformers", "timm", "torchvision"}


def package_of(path):
    """`vitcli/train/loop.py` -> `train`, `vitcli/run.py` -> `run`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree, at_load_only=False):
    """(module, line) of every import, those under TYPE_CHECKING and inside functions included.

    `at_load_only` leaves out what is not executed when the module is loaded.
    """
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if at_load_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if at_load_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = PACKAGE.parent / f"{node.module}.{alias.name}".replace(".", "/")
                is_module = submodule.with_suffix(".py").exists() or submodule.is_dir()
                name = f"{node.module}.{alias.name}" if is_module else node.module
                yield name, node.lineno
        nodes += ast.iter_child_nodes(node)


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE)


def test_every_package_and_module_has_a_rank():
    assert len(FILES) > 40
    assert {package_of(path) for path in FILES} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_to_its_right(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    mine = package_of(path)
    for module, line in imports(tree):
        top, _, rest = module.partition(".")
        assert top not in ORACLES, f"line {line}: {top} is an oracle for tests, not a dependency"
        if top != "vitcli" or not rest:
            continue
        theirs = rest.partition(".")[0]
        assert RANK[theirs] >= RANK[mine], f"line {line}: {mine} imports {module}"
        if mine == theirs == "commands":
            raise AssertionError(f"line {line}: a command imports another: {module}")


@pytest.mark.parametrize("path", sorted((PACKAGE / "vit").glob("*.py")), ids=lambda p: p.name)
def test_vit_imports_torch_and_itself_only(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for module, line in imports(tree):
        top = module.partition(".")[0]
        known = top in sys.stdlib_module_names or top == "torch" or module.startswith("vitcli.vit")
        assert known or module == "vitcli.config.choices", f"line {line}: {module}"


def test_the_choices_that_vit_shares_with_the_schema_need_nothing():
    tree = ast.parse((PACKAGE / "config" / "choices.py").read_text(encoding="utf-8"))
    assert {module for module, _ in imports(tree)} == {"typing"}


def test_no_import_goes_in_a_circle():
    graph = {}
    for path in FILES:
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name.removesuffix(".__init__")] = {
            m for m, _ in imports(tree, at_load_only=True) if m.startswith("vitcli.")
        }
    done, path = set(), []

    def visit(name):
        if name in done or name not in graph:
            return
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in sorted(graph):
        visit(name)


@pytest.mark.parametrize(
    "module",
    ["vitcli", "vitcli.cli.app", "vitcli.config.recipe", "vitcli.cli.console", "vitcli.errors"],
)
def test_nothing_heavy_is_loaded_with_the_command_line(module):
    code = f"import sys, {module}; print(' '.join({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
