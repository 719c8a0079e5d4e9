"""The direction of flow: no import runs backwards, and none runs in a circle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_deft

ROOT = Path(megatron_deft.__file__).parent
HEAVY = (
    "torch", "megatron", "transformers", "safetensors", "pyarrow", "tensorboard", "wandb",
    "matplotlib",
)  # fmt: skip

# Each room may import those on its line and nothing else of the package.
ROOMS = {
    "errors": set(),
    "files": {"errors"},
    "hashing": set(),
    "hf_files": set(),
    "options": set(),
    "processes": set(),
    "published": set(),
    "objectives": {"errors"},
    "config": {"errors", "objectives"},
    "checkpoint_folder": {"errors", "files", "hashing", "hf_files"},
    "revision": set(),
    "ops": {"errors"},
    "loss": {"errors", "objectives", "ops"},
    "platform": {"errors"},
    "models": {"errors", "loss", "platform"},
    "data": {"errors", "files", "hashing", "hf_files", "options", "processes", "config"},
    "integrations": {"errors", "objectives", "loss", "published"},
    "convert": {
        "errors", "files", "hashing", "hf_files", "checkpoint_folder", "platform", "models",
        "integrations", "revision",
    },
    "evaluation": {
        "errors", "files", "hashing", "checkpoint_folder", "options", "processes", "data",
        "platform",
    },
    "training": {
        "errors", "files", "hashing", "checkpoint_folder", "config", "data", "convert", "models",
        "loss", "platform", "objectives", "processes", "revision",
    },
    "benchmarks": {
        "errors", "files", "objectives", "ops", "loss", "platform", "models", "convert",
        "revision", "data", "processes", "config", "training",
    },
    "report": {"errors", "files", "options", "evaluation"},
    "launch": {"errors", "processes"},
    "one_click": {"errors", "files", "options", "objectives", "config", "launch", "published"},
    "doctor": {"errors", "ops", "models", "platform"},
}  # fmt: skip
TOP = {"cli", "train", "__init__", "__main__"}  # may import everything


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
        found[".".join(("megatron_deft", *parts))] = path
    return found


def imports(path: Path, only_on_import: bool = False) -> set[str]:
    """Modules of the package that a file imports; optionally only those run when it is imported."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if only_on_import:
        skipped = {
            id(child)
            for node in nodes
            if isinstance(node, ast.FunctionDef)
            or (isinstance(node, ast.If) and checks_types(node))
            for child in ast.walk(node)
        }
        nodes = [node for node in nodes if id(node) not in skipped]
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def checks_types(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def ours(names: set[str]) -> set[str]:
    """Names resolved to modules of the package."""
    known = modules()
    found = set()
    for name in names:
        while name and name not in known:
            name = name.rpartition(".")[0]
        if name and name != "megatron_deft":
            found.add(name)
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_follow_the_flow(module: str) -> None:
    here = room(module)
    if here in TOP:
        return
    assert here in ROOMS, f"{module}: name its room in ROOMS"
    used = {room(name) for name in ours(imports(modules()[module]))} - {here}
    assert used <= ROOMS[here], f"{module} imports {used - ROOMS[here]}"


def test_rooms_have_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(ROOMS):
        ready = {name for name, needs in ROOMS.items() if name not in done and needs <= done}
        assert ready, f"a circle among {set(ROOMS) - done}"
        done |= ready


def test_modules_have_no_circle() -> None:
    graph = {name: ours(imports(path, True)) - {name} for name, path in modules().items()}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys, megatron_deft.cli as cli\n"
        "try: cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        f"print('loaded:', [name for name in {HEAVY} if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "loaded: []"


def test_no_file_over_400_lines() -> None:
    sources = [
        p
        for ending in ("py", "cpp", "h", "cu", "cuh")
        for p in ROOT.parent.glob(f"csrc/**/*.{ending}")
    ]
    long = {p.name: n for p in [*modules().values(), *sources]
            if (n := len(p.read_text().splitlines())) > 400}  # fmt: skip
    assert not long


def test_every_public_function_of_the_package_is_documented() -> None:
    """What ruff's D1 rules do not see: the public names of `megatron_deft` itself."""
    for name in megatron_deft.__all__:
        assert name == "__version__" or getattr(megatron_deft, name).__doc__
