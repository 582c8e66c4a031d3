"""The house: how long a line and a function may be, and who may import whom."""
import ast
import importlib
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import eval  # noqa: F401  what it imports from elsewhere is there before GPUs are forbidden
import opct

ROOT = Path(__file__).parent.parent
PARTS = ROOT, ROOT / "support", ROOT / "tests", *(p.parent for p in ROOT.glob("studies/**/*.py"))
FILES = sorted({str(path.relative_to(ROOT)) for part in PARTS for path in part.glob("*.py")})
OURS = {"data", "model", "opct", "eval", "support"}
MAY_IMPORT = {**{name: {"support"} for name in FILES if name.startswith("support/")},
              "support/common.py": set(), "data.py": {"support"}, "model.py": {"support"},
              "opct.py": {"support", "data", "model"},
              "eval.py": {"support", "data", "model", "opct"}}


@pytest.mark.parametrize("name", FILES)
def test_lines_and_functions_are_short(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert max(map(len, text.splitlines()), default=0) <= 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def imports_of(path):
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return modules


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_arrows_point_down_only(name):
    imported = {module.split(".")[0] for module in imports_of(ROOT / name)}
    assert imported & OURS <= MAY_IMPORT[name]


def test_the_gpu_is_left_alone_at_import(monkeypatch):
    """Nobody even asks whether there is one: at import the device is not known yet."""
    def asked(*args):
        raise AssertionError("the GPU was asked for at import")

    for name in ("is_available", "is_initialized", "device_count", "current_device", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, asked)
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
            del sys.modules[name]
        assert importlib.import_module("opct") is not opct
        importlib.import_module("eval")


def test_nothing_outside_studies_imports_from_it():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("tests/*.py")]:
        assert "studies" not in {name.split(".")[0] for name in imports_of(path)}, path


def test_no_table_of_a_readme_is_wider_than_100_columns():
    for path in [ROOT / "README.md", *ROOT.glob("studies/*/README.md")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert max([len(line) for line in lines if line.startswith("|")], default=0) <= 100, path


def test_the_readme_shows_both_steps_as_they_stand():
    readme, source = (ROOT / "README.md").read_text(), (ROOT / "opct.py").read_text()
    steps = source[source.index("def sft_step"):source.index("\n\n\n# --- Scoring")]
    assert f"```python\n{steps}\n```" in readme
