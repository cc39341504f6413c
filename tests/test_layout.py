"""The house rules that a machine can check: links, guards, import direction, light imports, sizes."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("sft", "reward", "rl", "verifiers", "rollouts")
FILE_LINES = 400
FUNCTION_LINES = 80
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "ray", "torch", "transformers", "trl"}
LOOP_LINES = 150
"""the one training loop of a stage: `main` in `<room>/train.py`"""


def sources() -> list[Path]:
    """Every Python file of the package, by its real path (the links inside cabochon/ would give each room twice)."""
    floor = ROOT / "cabochon"
    files = [path for path in floor.rglob("*.py") if path.relative_to(floor).parts[0] not in ROOMS]
    for room in ROOMS:
        files += (ROOT / room).rglob("*.py")
    return sorted(files)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    """`rl/losses.py` -> `cabochon.rl.losses`."""
    return "cabochon." + name_of(path)[:-3].replace("/", ".").removeprefix("cabochon.").removesuffix(".__init__")


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_is_a_real_folder_linked_into_the_package(room):
    link = ROOT / "cabochon" / room
    assert link.is_symlink()
    assert os.readlink(link) == f"../{room}"
    assert (ROOT / room).is_dir()
    assert not (ROOT / room).is_symlink()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imported_by_its_bare_name_is_refused(room):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {room}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"ImportError: import cabochon.{room}, not {room}" in done.stderr


def test_the_package_init_is_empty_but_for_its_docstring():
    body = ast.parse((ROOT / "cabochon" / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr]


def test_tests_have_no_init_files():
    """They would put the root on sys.path and make files of the same name collide."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def lint_imports(root: Path) -> subprocess.CompletedProcess:
    """Run import-linter on a tree, with that tree's package and no other on the path."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    env = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=env)


def test_imports_point_down_only():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy_of_the_tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    shutil.copy(ROOT / "pyproject.toml", root)
    for name in ("cabochon", *ROOMS):
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return root


PLANTED = {
    "rooms meet": ("sft/planted.py", "import cabochon.reward", "sft", "reward"),
    "the floor looks up": ("cabochon/model/planted.py", "import cabochon.verifiers", "model", "verifiers"),
    "a room looks at a roof": ("rollouts/planted.py", "import cabochon.cli", "rollouts", "cli"),
    "a loss looks sideways": ("rl/losses.py", "import cabochon.rollouts", "rl.losses", "rollouts"),
    "verifiers pull jax": ("verifiers/planted.py", "import jax", "verifiers", "jax"),
    "a config pulls jax": ("cabochon/errors.py", "import jax.numpy", "errors", "jax"),
    "torch in the package": ("rl/planted.py", "import torch", "", "torch"),
}
"""file, line written into it, and who must then be told not to import whom"""


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_violation_is_caught(copy_of_the_tree, case):
    file, line, importer, imported = PLANTED[case]
    out = lint_with(copy_of_the_tree / file, line, copy_of_the_tree)
    importer = f"cabochon.{importer}".rstrip(".")
    imported = imported if imported in HEAVY else f"cabochon.{imported}"
    assert f"{importer} is not allowed to import {imported}" in out


def test_a_module_on_no_floor_is_caught(copy_of_the_tree):
    assert "planted" in lint_with(copy_of_the_tree / "cabochon/planted.py", "", copy_of_the_tree)


def lint_with(target: Path, line: str, root: Path) -> str:
    """What import-linter prints of a tree with one more line in one file; it must fail."""
    before = target.read_text() if target.exists() else None
    target.write_text((before or "") + line + "\n")
    try:
        done = lint_imports(root)
    finally:
        target.unlink() if before is None else target.write_text(before)
    assert done.returncode == 1, done.stdout + done.stderr
    return " ".join(done.stdout.split())


LIGHT = ("cli", "config", "doctor", "errors", "model.config", "overrides", "protocols", "types")


def test_light_modules_stay_light():
    """One interpreter imports them one after the other and says which was the first to pull something heavy."""
    verifiers = [module_of(path) for path in sources() if path.is_relative_to(ROOT / "verifiers")]
    modules = [*(f"cabochon.{name}" for name in LIGHT), *verifiers]
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    if heavy := {HEAVY} & set(sys.modules):
        sys.exit(f"{{module}} pulls {{', '.join(sorted(heavy))}}")
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_sizes_and_habits(path):
    text = path.read_text()
    assert text.count("\n") < FILE_LINES, "split it by idea"
    tree = ast.parse(text)
    assert not tree.body or ast.get_docstring(tree), "a module opens with a docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_loop = path.name == "train.py" and node.name == "main" and path.parent.name in ROOMS
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= (LOOP_LINES if is_loop else FUNCTION_LINES), f"{node.name} has {length} lines"
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except hides bugs"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "hasattr", f"line {node.lineno}: a choice is a type, not a hasattr"


def named_in(path: Path) -> set[str]:
    """Modules a file imports or names in a string, such as `"cabochon.verifiers.math_judge:judge"`."""
    text = path.read_text()
    named = set(re.findall(r"\bcabochon(?:\.\w+)+", text))
    for parent, names in re.findall(r"from (cabochon[\w.]*) import (\([^)]*\)|[^\n]*)", text):
        named |= {f"{parent}.{name}" for name in re.findall(r"\w+", names)}
    return named


def test_every_module_is_reached_from_a_test():
    """Directly or through what a test imports or starts (`python -m cabochon`): a module nobody reaches is dead."""
    files = {module_of(path): path for path in sources() if path.name != "__init__.py"}
    reached: set[str] = set()
    todo = {"cabochon.__main__"}.union(*(named_in(path) for path in (ROOT / "tests").rglob("test_*.py")))
    while todo:
        reached |= todo
        todo = set().union(*(named_in(files[name]) for name in todo if name in files)) - reached
    assert [name_of(path) for name, path in files.items() if name not in reached] == []


USED_BY_OTHERS: dict[str, str] = {}
"""dependencies no module imports, and who needs them"""
ON_USE = {
    "reasoning-gym": "its verifier, which names the extra to install where it is missing",
    "pyarrow": "parquet files of rows, the same",
    "datasets": "Hugging Face dataset directories, the same",
    "fastapi": "`cabochon serve` and `cabochon view`, the same",
    "uvicorn": "the same",
    "wandb": "`run.trackers`, the same",
    "mlflow-skinny": "the same",
}
"""optional dependencies that a module imports, and which"""
NOT_A_DEPENDENCY = {"cabochon", "pydantic_core"}
"""itself, and the half of pydantic that pydantic pins"""


def test_dependencies_and_imports_agree():
    """Nothing is imported that is not declared, and nothing is declared that is not used."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {canonical(Requirement(line).name) for line in project["dependencies"]}
    optional = [line for lines in project["optional-dependencies"].values() for line in lines]
    assert {canonical(Requirement(line).name) for line in optional} >= set(ON_USE)
    imported: set[str] = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    owners = packages_distributions()
    third_party = imported - set(sys.stdlib_module_names) - NOT_A_DEPENDENCY
    used = {canonical(owner) for module in third_party for owner in owners.get(module, [module])}
    assert used - base == set(ON_USE)
    assert base - used == set(USED_BY_OTHERS)


def canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
