"""The shape of the house: wings and layers, file and function sizes, what an import loads, what a run may never do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pvae

ROOT = Path(pvae.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
WINGS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
STUBS = sorted(ROOT.rglob("__init__.pyi"))
# Names of values that say nothing of the value.
EMPTY = {"found", "own", "told", "made", "kept"}


def name_of(path):
    return str(path.relative_to(ROOT))


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def test_layers_hold():
    program = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(program, cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_has_lost_its_shape(path):
    assert len(path.read_text().splitlines()) <= 400


def body_lines(function):
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


def test_functions_are_short():
    lengths = sorted(body_lines(function) for path in FILES for function in functions(path))
    assert lengths[len(lengths) // 2] <= 8
    assert lengths[int(0.95 * len(lengths))] <= 25


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_values_are_named_by_what_they_are(path):
    names = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)]
    empty = sorted({(node.lineno, node.id) for node in names if isinstance(node.ctx, ast.Store) and node.id in EMPTY})
    assert not empty


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["fit", "--help"], ["fit", "--epohcs", "3"]])
def test_help_imports_no_torch(arguments):
    code = (
        "import sys; from pvae.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'pyro', 'numpy', 'matplotlib', 'xarray')))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_pvae_changes_nothing_for_others():
    code = (
        "import torch, pyro, importlib\n"
        "before = (torch.distributions.Distribution._validate_args, pyro.settings.get(), torch.get_rng_state().sum())\n"
        "import pvae\n"
        "for name in pvae.__all__: getattr(pvae, name)\n"
        f"for wing in {WINGS}:\n"
        "    wing = importlib.import_module('pvae.' + wing)\n"
        "    for name in wing.__all__: getattr(wing, name)\n"
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


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_says_what_it_is_for_and_exports_what_its_stub_names(wing):
    code = (ROOT / wing / "__init__.py").read_text()
    assert len(ast.get_docstring(ast.parse(code)).splitlines()) >= 2
    assert len(code.splitlines()) <= 16
    stub = ast.parse((ROOT / wing / "__init__.pyi").read_text())
    names = {alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    module = __import__(f"pvae.{wing}", fromlist=["__all__"])
    assert set(module.__all__) == names
    assert all(getattr(module, name) is not None for name in names)


@pytest.mark.parametrize("path", STUBS, ids=name_of)
def test_an_exported_name_is_no_modules_name(path):
    """A sub-module, once imported, would take the place of the function of its name."""
    stub, modules = ast.parse(path.read_text()), {file.stem for file in path.parent.iterdir()}
    for node in stub.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not {alias.name for alias in node.names} & modules
