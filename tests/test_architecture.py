"""Who may import whom. The rules are those of the map in posttrain/__init__.py."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = ("posttrain", "rewards", "data", "eval")


def imports(path: Path) -> set[str]:
    """Modules that a file names in imports, wherever they stand, those for type checking left out."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(*folders: str) -> dict[str, set[str]]:
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert paths
    return {str(path.relative_to(ROOT)): imports(path) for path in paths}


def importers(package: str) -> set[str]:
    return {
        name
        for name, modules in files(*OURS).items()
        if any(m == package or m.startswith(package + ".") for m in modules)
    }


def test_one_room_knows_ray_and_two_files_know_vllm() -> None:
    assert {str(Path(name).parent) for name in importers("ray")} == {"posttrain/cluster"}
    assert importers("vllm") == {"posttrain/sampler.py", "posttrain/vllm_extension.py"}


def test_descriptions_stand_on_nothing_of_ours() -> None:
    for name in (
        "posttrain/sections.py",
        "posttrain/types.py",
        "posttrain/errors.py",
        "posttrain/algorithms.py",
    ):
        assert not {m for m in imports(ROOT / name) if m.split(".")[0] in OURS}, name
    names = ("sections", "grpo_sections", "lora_section", "recipe", "errors", "algorithms")
    descriptions = tuple(f"posttrain.{name}" for name in names)
    for path in (ROOT / "posttrain").glob("*recipe.py"):
        foreign = {m for m in imports(path) if m.split(".")[0] in OURS and not m.startswith(descriptions)}
        assert not {m for m in foreign if not re.match(r"posttrain\.\w+_recipe\b", m)}, path


def test_data_and_rewards_stand_on_types_alone() -> None:
    for name, modules in files("data", "rewards").items():
        allowed = ("posttrain.types", "data", "rewards")
        foreign = {m for m in modules if m.split(".")[0] in OURS and not m.startswith(allowed) and m != "posttrain"}
        assert not foreign, (name, foreign)


def test_mathematics_knows_neither_recipes_nor_engines() -> None:
    mathematics = ("losses", "distillation_losses", "advantages", "packing", "prompt_sharing")
    allowed = ("posttrain.types", *(f"posttrain.{name}" for name in mathematics))
    for name in mathematics:
        name = f"posttrain/{name}.py"
        ours = {m for m in imports(ROOT / name) if m.split(".")[0] in OURS and not m.startswith(allowed)}
        assert not ours, (name, ours)


def test_every_recipe_key_is_documented() -> None:
    from posttrain.recipe import RECIPES
    from posttrain.recipe_file import _key_paths

    text = (ROOT / "docs/recipes.md").read_text()
    missing = {key.split(".")[-1] for recipe in RECIPES.values() for key in _key_paths(recipe)}
    assert not {key for key in missing if f"`{key}`" not in text}


def test_no_benchmark_hides_a_package() -> None:
    """`python benchmarks/x.py` looks for modules beside x.py first."""
    assert not [path for path in (ROOT / "benchmarks").iterdir() if path.stem in OURS]
