"""The face: what ``import pvae`` gives, what it costs, and what it says to those who ask for something else."""

import importlib
import re
import subprocess
import sys

import pytest

import pvae
from pvae._moved import MOVED

VERBS = {"compare", "diagnose", "evaluate", "fit", "load_data", "log_weights", "mask_missing", "open_run"}
VERBS |= {"posterior"}
NOUNS = {"Amortized", "Dataset", "PerDatapoint", "Recipe", "RefinedGuide", "SemiAmortized", "UserError", "VAE"}
NAMESPACES = {
    *("applications", "diagnostics", "families", "likelihoods", "networks", "noise", "objectives", "priors"),
    *("samplers", "sklearn", "stats"),
}


def test_it_gives_verbs_nouns_and_namespaces():
    assert set(pvae.__all__) == VERBS | NOUNS | NAMESPACES
    assert set(dir(pvae)) >= set(pvae.__all__)
    assert all(callable(getattr(pvae, name)) for name in VERBS | NOUNS)
    assert all(getattr(pvae, name).__name__.startswith("pvae.") for name in NAMESPACES)


def test_importing_it_imports_nothing_heavy():
    heavy = ("torch", "pyro", "numpy", "pandas", "matplotlib", "xarray", "sklearn")
    code = f"import sys, pvae; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_mypy_and_editors_see_its_names(tmp_path):
    (tmp_path / "use.py").write_text("import pvae\nreveal_type(pvae.fit)\npvae.VAE(1)\npvae.nonsense\n")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--follow-imports=silent",
        "--cache-dir",
        str(tmp_path / "cache"),
        "use.py",
    ]
    lines = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert "epochs: int" in lines
    assert 'Module has no attribute "nonsense"' in lines


@pytest.mark.parametrize(
    ("wrong", "right"), [("Amortised", "Amortized"), ("load", "load_data"), ("evalute", "evaluate")]
)
def test_an_unknown_name_is_answered_with_the_nearest(wrong, right):
    with pytest.raises(AttributeError, match=f"no attribute '{wrong}'; did you mean '{right}'"):
        getattr(pvae, wrong)


@pytest.mark.parametrize("old", MOVED)
def test_an_old_module_path_is_answered_with_the_new_one(old):
    with pytest.raises(ImportError, match=re.escape(f"pvae.{old} has moved to pvae.{MOVED[old]}")) as refused:
        importlib.import_module(f"pvae.{old}")
    assert not isinstance(refused.value, ModuleNotFoundError)
    importlib.import_module(f"pvae.{MOVED[old]}")


def test_a_module_that_never_was_is_missing_as_ever():
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        importlib.import_module("pvae.nonsense")
