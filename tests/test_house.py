"""No import runs up: a file imports only from its own room and from the floors below it. And every file says what it is for."""
import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [("kernels", "config"), ("sparse", "data"), ("lib",), ("model", "predictor"), ("train",), ("tools",), ("results",),
          ("tests", "test_sparse")]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
FILES = [Path(f) for f in subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
         if not f.startswith("config/") or f == "config/__init__.py"]


def imported(tree):
    """Names of all modules that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_import_runs_up(file):
    tree, room = ast.parse((ROOT / file).read_text()), file.parts[0].removesuffix(".py")
    for name in imported(tree):
        other = name.split(".")[0]
        if other in FLOOR and other != room:
            assert FLOOR[other] < FLOOR[room], f"{file} imports {name}"
    assert ast.get_docstring(tree) or ast.get_docstring(tree) is None and (ROOT / file).read_text().startswith("#"), \
        f"{file} does not say what it is for"


def test_the_top_level_is_the_card():
    top = {f.parts[0] for f in map(Path, subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split())}
    assert top == {"train.py", "model.py", "sparse.py", "kernels.py", "predictor.py", "data", "config", "test_sparse.py", "README.md",
                   "lib", "tools", "tests", "results", "LICENSE", "requirements.txt", "requirements-test.txt", "pytest.ini",
                   ".gitignore", ".ci"}
