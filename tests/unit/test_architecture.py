"""What holds the repository together: who imports whom, and no path of one machine.

Modules are read with ``ast`` and never imported, so that imports inside functions and under ``TYPE_CHECKING`` count.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A part imports from lower layers and from itself; parts of one layer do not import each other.
LAYERS = (
    ("errors",),
    ("config",),
    ("settings",),
    ("initialization",),
    ("parallel",),
    ("moe",),
    ("models",),
    ("data", "telemetry", "checkpoint"),
    ("evaluate", "generate"),
    ("train", "serve"),
    ("planner",),
    ("tools",),
    ("cli", "__init__"),
    ("__main__",),
)
LAYER_OF = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}

MAY_IMPORT_DEEPSPEED = ("moe_scale/parallel/zero.py", "moe_scale/train/engine.py", "moe_scale/moe/backends/*.py")
MAY_IMPORT_GET_ACCELERATOR = "moe_scale/parallel/device.py"
GET_ACCELERATOR = {
    "deepspeed.accelerator.get_accelerator",
    "deepspeed.accelerator.real_accelerator.get_accelerator",
}
MAY_NAME_TORCH_CUDA = "moe_scale/moe/kernels/*"


def python_files(*folders: str) -> list[str]:
    """Paths of all Python files below ``folders``, relative to the repository's root."""
    return sorted(path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py"))


def matches(path: str, *patterns: str) -> bool:
    return any(Path(path).match(pattern) for pattern in patterns)


def imported_names(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """``(line, dotted name)`` of everything that is imported; ``from a import b`` gives ``a.b``."""
    package = Path(path).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def wrong_imports(path: str, source: str) -> list[str]:
    """Imports of ``path``, a file of moe_scale, that point up or sideways."""
    here = Path(path).with_suffix("").parts[1]
    if here not in LAYER_OF:
        return [f"{path}: moe_scale.{here} has no place in LAYERS of {Path(__file__).name}"]
    layer, found = LAYER_OF[here], []
    for line, name in imported_names(ast.parse(source), path):
        top, *rest = name.split(".")
        if top in ("recipes", "tests"):
            found.append(f"{path}:{line}: moe_scale imports {name}, which is outside of it")
        elif top == "moe_scale" and rest and rest[0] in LAYER_OF and rest[0] != here and LAYER_OF[rest[0]] >= layer:
            found.append(f"{path}:{line}: moe_scale.{here} imports {name}")
    return found


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Everyone imports moe_scale/__init__.py; what it offers is imported when it is used."""
    check = "import sys, moe_scale; assert not {'torch', 'deepspeed'} & set(sys.modules); moe_scale.load_model"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def wrong_deepspeed_imports(path: str, source: str) -> list[str]:
    if matches(path, *MAY_IMPORT_DEEPSPEED):
        return []
    allowed = GET_ACCELERATOR if path == MAY_IMPORT_GET_ACCELERATOR else set()
    return [
        f"{path}:{line}: imports {name}"
        for line, name in imported_names(ast.parse(source), path)
        if name.split(".")[0] == "deepspeed" and name not in allowed
    ]


def uses_of_torch_cuda(path: str, source: str) -> list[str]:
    if matches(path, MAY_NAME_TORCH_CUDA):
        return []
    tree = ast.parse(source)
    lines = [line for line, name in imported_names(tree, path) if f"{name}.".startswith("torch.cuda.")]
    lines += [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda"
    ]
    return [f"{path}:{line}: torch.cuda" for line in sorted(lines)]


def test_imports_point_one_way() -> None:
    found = [line for path in python_files("moe_scale") for line in wrong_imports(path, (ROOT / path).read_text())]
    assert not found, "\n".join(found)


def test_deepspeed_is_imported_in_few_places() -> None:
    files = python_files("moe_scale", "recipes")
    found = [line for path in files for line in wrong_deepspeed_imports(path, (ROOT / path).read_text())]
    assert not found, "\n".join(found)


def test_torch_cuda_is_for_kernels() -> None:
    files = python_files("moe_scale", "recipes")
    found = [line for path in files for line in uses_of_torch_cuda(path, (ROOT / path).read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("moe_scale/moe/layer.py", "from moe_scale.parallel.groups import Groups", True),
        ("moe_scale/moe/layer.py", "from moe_scale.moe import router", True),
        ("moe_scale/moe/layer.py", "from . import router", True),
        ("moe_scale/moe/layer.py", "from ..models import decoder", False),
        ("moe_scale/moe/layer.py", "from moe_scale import models", False),
        ("moe_scale/moe/layer.py", "def f():\n    import moe_scale.models.decoder", False),
        ("moe_scale/moe/layer.py", "importlib.import_module('moe_scale.train')", False),
        ("moe_scale/data/text.py", "from moe_scale.evaluate import bleu", False),
        ("moe_scale/train/loop.py", "from moe_scale.evaluate import bleu", True),
        ("moe_scale/train/loop.py", "import recipes.lm_16l", False),
        ("moe_scale/nowhere.py", "", False),
    ],
)
def test_the_rule_of_imports_itself(path: str, source: str, allowed: bool) -> None:
    assert (not wrong_imports(path, source)) == allowed


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("moe_scale/parallel/zero.py", "import deepspeed", True),
        ("moe_scale/moe/backends/autoep.py", "from deepspeed.utils import groups", True),
        ("moe_scale/parallel/device.py", "from deepspeed.accelerator import get_accelerator", True),
        ("moe_scale/parallel/device.py", "import deepspeed", False),
        ("moe_scale/moe/layer.py", "from deepspeed.accelerator import get_accelerator", False),
        ("recipes/lm_16l.py", "def f():\n    import deepspeed.comm as dist", False),
        ("moe_scale/moe/layer.py", "import deepspeed_like", True),
    ],
)
def test_the_rule_of_deepspeed_itself(path: str, source: str, allowed: bool) -> None:
    assert (not wrong_deepspeed_imports(path, source)) == allowed


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("moe_scale/moe/kernels/permute.py", "torch.cuda.current_stream()", True),
        ("moe_scale/moe/layer.py", "torch.cuda.current_stream()", False),
        ("moe_scale/moe/layer.py", "from torch import cuda", False),
        ("moe_scale/moe/layer.py", "from torch.cuda import Stream", False),
        ("moe_scale/moe/layer.py", "'torch.cuda'  # and words about torch.cuda", True),
    ],
)
def test_the_rule_of_torch_cuda_itself(path: str, source: str, allowed: bool) -> None:
    assert (not uses_of_torch_cuda(path, source)) == allowed


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    # An absolute path: not the middle of a relative one, as in src/work/.
    machine_path = re.compile(rb"(?<![\w.$)}~-])/(?:work|root)/")
    found = []
    for name in filter(None, listing.split("\0")):
        path = ROOT / name
        if path.is_file():  # a file deleted in the work tree is still listed
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                if machine_path.search(line):
                    found.append(f"{name}:{number}: {line.decode(errors='replace').strip()}")
    assert not found, "\n".join(found)
