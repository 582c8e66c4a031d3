"""The house: how long a line and a function may be, and who may import whom."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NARROW = ["data.py", "eval.py", "studies/pool.py", "studies/stats.py", "studies/plots.py",
          "studies/claims/attack.py", "studies/claims/report.py", "studies/claims/run.py",
          "studies/claims/test_claims.py", "studies/claims/__main__.py",
          "studies/speed/__main__.py", "studies/speed/report.py", "studies/speed/run.py",
          "studies/speed/sampler.py", "studies/speed/test_speed.py", "studies/speed/training.py",
          "tests/test_eval.py", "tests/test_data.py", "tests/test_model.py", "support/words.py",
          "support/report.py",
          "model.py", "opct.py", "support/common.py", "support/packing.py",
          "support/runs.py", "support/tokenizer.py", "support/huggingface.py",
          "support/templates.py", "tests/test_tokenizer.py",
          "tests/conftest.py", "tests/test_gradients.py", "tests/test_house.py",
          "tests/test_training.py"]
OURS = {"data", "model", "opct", "eval", "support"}
MAY_IMPORT = {"support/common.py": set(), "support/tokenizer.py": {"support"},
              "support/huggingface.py": {"support"}, "support/templates.py": {"support"},
              "support/packing.py": {"support"}, "support/words.py": {"support"},
              "support/runs.py": {"support"}, "support/report.py": {"support"},
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


def test_the_gpu_is_left_alone_at_import():
    code = "import data, model, opct, eval, torch; assert not torch.cuda.is_initialized()"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_nothing_outside_studies_imports_from_it():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("tests/*.py")]:
        assert "studies" not in {name.split(".")[0] for name in imports_of(path)}, path


@pytest.mark.parametrize("name, lines", {
    "README.md": 220, "train.sh": 70, "data.py": 420, "model.py": 420,
    "opct.py": 380, "eval.py": 350,
    "support/common.py": 220, "support/runs.py": 220, "support/tokenizer.py": 200}.items())
def test_a_file_keeps_to_its_lines(name, lines):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= lines


def test_no_table_of_a_readme_is_wider_than_100_columns():
    for path in [ROOT / "README.md", *ROOT.glob("studies/*/README.md")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert max([len(line) for line in lines if line.startswith("|")], default=0) <= 100, path


def test_the_readme_shows_opct_step_as_it_stands():
    readme, source = (ROOT / "README.md").read_text(), (ROOT / "opct.py").read_text()
    step = source[source.index("def opct_step"):source.index("\n\n\n# --- Scoring")]
    assert f"```python\n{step}\n```" in readme
