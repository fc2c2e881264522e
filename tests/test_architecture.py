"""The rooms, who may import whom, and what no file may do: the table, and the tree held against it by its syntax."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 400
LEAF = frozenset({"torch", "numpy", "einops", "safetensors", "jaxtyping"})


@dataclass(frozen=True)
class Room:
    """own: the project's modules it may import besides itself; everywhere: third-party packages it may import at the
    top of a file; inside: third-party packages that only a function that needs them may import."""

    own: frozenset[str]
    everywhere: frozenset[str]
    inside: frozenset[str]


ROOMS = {
    "moe": Room(frozenset(), LEAF, frozenset({"triton", "matplotlib", "fairscale"})),
    "sparse_attn": Room(frozenset(), LEAF, frozenset({"triton", "matplotlib"})),
    "pruning": Room(frozenset(), LEAF, frozenset({"transformers", "matplotlib"})),
    "transformer": Room(
        frozenset({"moe", "sparse_attn", "pruning.axes"}),
        LEAF | {"tokenizers"},
        frozenset({"transformers", "accelerate", "gguf"}),
    ),
    "training": Room(
        frozenset({"moe", "sparse_attn", "pruning", "transformer"}),
        LEAF | {"tokenizers", "tyro", "rich"},
        frozenset({"datasets", "pyarrow", "matplotlib", "tensorboard", "transformers", "psutil"}),
    ),
}
# Modules of kernels, written in the language of an optional package: they import it at the top of the file, and are
# themselves imported only inside a function that needs them.
KERNELS = frozenset({"sparse_attn.backends.triton_kernels"})
# What an oracle may share with the code it judges: the records that pass between stages, and nothing that computes.
RECORDS = frozenset({"moe.routing", "sparse_attn.patterns", "pruning.axes"})
UNPICKLERS = frozenset({"pickle", "cPickle", "dill", "shelve", "marshal", "joblib", "cloudpickle"})
CATCH_ALLS = frozenset({"utils", "util", "helpers", "misc", "common"})


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    nested: bool


def imports(tree: ast.Module, module: str, *, is_package: bool = False) -> Iterator[Import]:
    """Every import, absolute, with whether it stands inside a function or under TYPE_CHECKING."""
    deferred = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(outer, ast.If) and ast.unparse(outer.test).endswith("TYPE_CHECKING"))
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) in deferred)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, id(node) in deferred)


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parents = module.split(".")
    kept = parents[: len(parents) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _within(name: str, allowed: frozenset[str]) -> bool:
    return any(name == entry or name.startswith(entry + ".") for entry in allowed)


def wrong_imports(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Imports of ``module`` that the table does not allow, one line each."""
    room_name = module.split(".")[0]
    room = ROOMS[room_name]
    wrong = []
    for found in imports(ast.parse(source), module, is_package=is_package):
        top = found.module.split(".")[0]
        where = f"{module}:{found.line} imports {found.module}"
        if _within(found.module, KERNELS) and not found.nested:
            wrong.append(f"{where} outside the function that needs it")
        if top in sys.stdlib_module_names or top == room_name:
            continue
        if top in ROOMS:
            if not _within(found.module, room.own):
                wrong.append(f"{where} against the direction")
        elif top in room.inside:
            if not found.nested and module not in KERNELS:
                wrong.append(f"{where} outside the function that needs it")
        elif top not in room.everywhere:
            wrong.append(f"{where}, which is not in the table")
    return wrong


def wrong_reference(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Imports by which an oracle would share code with what it judges."""
    return [
        f"{module}:{found.line} imports {found.module}"
        for found in imports(ast.parse(source), module, is_package=is_package)
        if found.module.split(".")[0] in ROOMS and not _within(found.module, RECORDS)
    ]


def unpickling(module: str, source: str) -> list[str]:
    """Places that could run code from a file."""
    tree = ast.parse(source)
    wrong = [
        f"{module}:{found.line} imports {found.module}"
        for found in imports(tree, module)
        if found.module.split(".")[0] in UNPICKLERS or found.module in ("torch.load", "torch.save")
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save"):
            wrong.append(f"{module}:{node.lineno} calls {ast.unparse(node.func)}")
        if isinstance(node, ast.keyword) and ast.unparse(node) in ("allow_pickle=True", "weights_only=False"):
            wrong.append(f"{module}:{node.lineno} passes {ast.unparse(node)}")
    return wrong


def loading(where: str, source: str) -> list[str]:
    """Calls of torch.load that do not say weights_only=True."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        f"{where}:{call.lineno} calls torch.load"
        for call in calls
        if ast.unparse(call.func) == "torch.load"
        and "weights_only=True" not in [ast.unparse(keyword) for keyword in call.keywords]
    ]


def undocumented(module: str, source: str) -> list[str]:
    """Public functions, classes and methods without a docstring (what torch's Module documents is exempt)."""
    wrong = []

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            overload = any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)
            exempt = overload or node.name in ("forward", "extra_repr")
            if node.name.startswith("_") or exempt:
                continue
            if not ast.get_docstring(node):
                wrong.append(f"{module}:{node.lineno} {prefix}{node.name}")
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")

    visit(ast.parse(source).body, "")
    return wrong


def package_files() -> list[Path]:
    """Every Python file of the five packages."""
    return sorted(path for name in ROOMS for path in (ROOT / name).rglob("*.py"))


def module_name(path: Path) -> str:
    """moe/routers/__init__.py → moe.routers"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _all(check) -> list[str]:
    return [line for path in package_files() for line in check(path, module_name(path), path.read_text())]


def test_packages_import_only_what_the_table_allows():
    assert not _all(lambda path, name, text: wrong_imports(name, text, is_package=path.name == "__init__.py"))


def test_references_import_only_the_records():
    assert not _all(lambda path, name, text: wrong_reference(name, text) if path.stem == "reference" else [])


def test_nothing_unpickles():
    assert not _all(lambda path, name, text: unpickling(name, text))
    files = [path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert not [line for path in files for line in loading(str(path.relative_to(ROOT)), path.read_text())]


def test_every_public_name_has_a_docstring():
    assert not _all(lambda path, name, text: undocumented(name, text))


def test_no_long_files_and_no_catch_all_modules():
    folders = [*ROOMS, "tests", "benchmarks", "examples"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in files if path.read_text().count("\n") > MAX_LINES]
    assert not [path for path in files if path.stem in CATCH_ALLS]


def test_every_folder_of_code_is_a_package_and_every_room_exists():
    folders = {path.parent for path in package_files()}
    assert {ROOT / name for name in ROOMS} <= folders
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


@pytest.mark.parametrize(
    "module, source, wrong",
    [
        ("moe.layer", "import sparse_attn", True),
        ("moe.layer", "from training.step import step", True),
        ("transformer.model", "from training import trainer", True),
        ("transformer.model", "from pruning.surgery import shrink", True),
        ("transformer.model", "from pruning import surgery", True),
        ("transformer.model", "from pruning import axes", False),
        ("transformer.model", "from pruning.axes import Axis", False),
        ("training.report", "import matplotlib.pyplot", True),
        ("training.report", "def draw():\n    import matplotlib.pyplot", False),
        ("pruning.surgery", "import pandas", True),
        ("sparse_attn.backends.triton", "import triton", True),
        ("sparse_attn.backends.triton_kernels", "import triton.language", False),
        ("sparse_attn.backends.triton", "from sparse_attn.backends import triton_kernels", True),
        ("sparse_attn.backends.triton", "def f():\n    from sparse_attn.backends import triton_kernels", False),
        ("moe.layer", "from .routing import Routing", False),
        ("moe.routers.top_k", "from ..routing import Routing\nimport math", False),
    ],
)
def test_the_import_check_sees_a_planted_breach(module, source, wrong):
    assert bool(wrong_imports(module, source)) == wrong


@pytest.mark.parametrize(
    "source, wrong",
    [
        ("from moe.routing import Routing\nimport torch", False),
        ("from .routing import Routing", False),
        ("from moe.experts import Experts", True),
        ("from .dispatch import group", True),
        ("from moe import MoE", True),
    ],
)
def test_the_reference_check_sees_a_planted_breach(source, wrong):
    assert bool(wrong_reference("moe.reference", source)) == wrong


@pytest.mark.parametrize(
    "source", ["import pickle", "from torch import load", "torch.load(path)", "np.load(p, allow_pickle=True)"]
)
def test_the_unpickling_check_sees_a_planted_breach(source):
    assert unpickling("training.checkpoint", source)


def test_the_loading_check_sees_a_planted_breach():
    lines = ["torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=True)"]
    assert loading("tests/a.py", "\n".join(lines)) == [f"tests/a.py:{line} calls torch.load" for line in (1, 2)]


def test_the_docstring_check_sees_a_planted_breach():
    source = 'class A:\n    """A."""\n    def f(self): pass\n    def _g(self): pass\n    def forward(self): pass'
    assert undocumented("moe.layer", source) == ["moe.layer:3 A.f"]
