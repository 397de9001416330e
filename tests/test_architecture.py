"""The shape of the house: floors, file and function sizes, what an import loads, what a run may never do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pvae

ROOT = Path(pvae.__file__).parent
FILES = sorted(ROOT.glob("*.py"))


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def test_floors_hold():
    program = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(program, cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_has_lost_its_shape(path):
    assert len(path.read_text().splitlines()) <= 400


def body_lines(function):
    first = function.body[0]
    told = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if told else 0)


def test_functions_are_short():
    lengths = sorted(body_lines(function) for path in FILES for function in functions(path))
    assert lengths[len(lengths) // 2] <= 8
    assert lengths[int(0.95 * len(lengths))] <= 35


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["fit", "--help"], ["fit", "--epohcs", "3"]])
def test_help_imports_no_torch(arguments):
    code = (
        "import sys; from pvae.cli.app import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'pyro', 'numpy', 'matplotlib', 'xarray')))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_pvae_changes_nothing_for_others():
    code = (
        "import torch, pyro\n"
        "before = (torch.distributions.Distribution._validate_args, pyro.settings.get(), torch.get_rng_state().sum())\n"
        "import pvae\n"
        "for name in pvae.MODULES: getattr(pvae, name)\n"
        "after = (torch.distributions.Distribution._validate_args, pyro.settings.get(), torch.get_rng_state().sum())\n"
        "assert before == after, (before, after)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_ever_unpickled():
    for path in FILES:
        words = path.read_text()
        assert "import pickle" not in words, path
        assert "torch.load" not in words, path
        assert "allow_pickle=True" not in words, path


def test_every_module_is_reachable_from_the_root():
    assert {path.stem for path in FILES if not path.stem.startswith("_")} == set(pvae.MODULES)


def test_the_root_knows_no_other_names():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pvae.nonsense  # noqa: B018
