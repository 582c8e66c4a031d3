"""The house: how long a line and a function may be, and who may import whom."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# eval.py and the tests of it, of the world and of the model are still to be narrowed.
NARROW = ["data.py", "model.py", "opct.py", "support/common.py", "support/packing.py",
          "support/runs.py", "support/tokenizer.py",
          "tests/conftest.py", "tests/test_gradients.py", "tests/test_house.py",
          "tests/test_training.py"]
OURS = {"data", "model", "opct", "eval", "support"}
MAY_IMPORT = {"support/common.py": set(), "support/tokenizer.py": {"support"},
              "support/packing.py": {"support"}, "support/runs.py": {"support"},
              "data.py": {"support"}, "model.py": {"support"},
              "opct.py": {"support", "data", "model"},
              "eval.py": {"support", "data", "model", "opct"}}


@pytest.mark.parametrize("name", NARROW)
def test_lines_and_functions_are_short(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_arrows_point_down_only(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported & OURS <= MAY_IMPORT[name]


def test_the_gpu_is_left_alone_at_import():
    code = "import data, model, opct, eval, torch; assert not torch.cuda.is_initialized()"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
