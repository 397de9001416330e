"""Every example runs with few epochs; the components of my_components.py obey the laws of the package's own."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pyro
import pytest
import test_components as laws
import torch
from cases import LATENT

from pvae.recipes import registry
from pvae.runtime.torch_state import seeded

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
COMPONENTS = EXAMPLES[0].parent / "my_components.py"

LIKELIHOOD_LAWS = [
    laws.test_a_row_does_not_feel_its_neighbours,
    laws.test_every_parameter_receives_a_finite_gradient,
    laws.test_every_tensor_moves_with_its_module,
    laws.test_one_entry_has_mass_one_and_draws_follow_it,
    laws.test_draws_lie_in_the_support_and_masses_are_on_discrete_ones,
    laws.test_mean_is_the_mean_of_draws,
    laws.test_distribution_refuses_what_is_outside_its_likelihoods_support,
    laws.test_plates_expand_and_masks_hide,
    laws.test_expected_score_is_zero,
]
PRIOR_LAWS = [
    laws.test_every_parameter_receives_a_finite_gradient,
    laws.test_state_dict_carries_all_that_was_learned,
    laws.test_every_tensor_moves_with_its_module,
    laws.test_density_has_mass_one_and_draws_follow_it,
    laws.test_draws_of_another_are_scored_row_by_row_under_plates,
    laws.test_each_place_under_plates_has_a_draw_of_its_own,
]
FAMILY_LAWS = [
    laws.test_a_row_does_not_feel_its_neighbours,
    laws.test_every_parameter_receives_a_finite_gradient,
    laws.test_every_tensor_moves_with_its_module,
    laws.test_expected_score_is_zero,
    laws.test_density_has_mass_one_and_draws_follow_it,
    laws.test_pathwise_gradient_is_the_score_functions,
    laws.test_each_place_under_plates_has_a_draw_of_its_own,
    laws.test_initial_params_are_one_finite_row,
    laws.test_every_entry_of_the_initial_params_receives_a_gradient,
]


def component(kind, name, **supplied):
    return registry.make(kind, f"{COMPONENTS}:{name}", **supplied)


CASES = [
    *((law, lambda: component("likelihood", "Geometric")) for law in LIKELIHOOD_LAWS),
    *((law, lambda: component("prior", "SpikeAndSlab", dim=LATENT)) for law in PRIOR_LAWS),
    *((law, lambda: component("family", "Laplace", dim=LATENT)) for law in FAMILY_LAWS),
]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "2"])
    with seeded(0), pyro.get_param_store().scope():
        runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert re.search(r"\d ± \d|\d nats", out)  # an estimate with its error, or at least its unit
    assert not re.search(r"\bnan\b", out)


def test_a_component_takes_under_twenty_lines():
    classes = [node for node in ast.parse(COMPONENTS.read_text()).body if isinstance(node, ast.ClassDef)]
    assert [node.name for node in classes] == ["Geometric", "SpikeAndSlab", "Laplace"]
    assert all(node.end_lineno - node.lineno + 1 < 20 for node in classes)


@pytest.mark.parametrize(("law", "make"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_users_component_obeys(law, make, double):
    torch.manual_seed(0)
    law(make)


def test_a_users_component_is_trained_by_its_name(tmp_path, pvae):
    prior = f"'{COMPONENTS}:SpikeAndSlab(spike=0.05)'"
    options = f"--likelihood {COMPONENTS}:Geometric --prior {prior} --family {COMPONENTS}:Laplace"
    assert pvae(f"fit {options} --epochs 1 --out {tmp_path / 'run'}").status == 0
    refused = pvae(f"evaluate {tmp_path / 'run'} --rows 2 --samples 2 --refine-steps 1")
    assert refused.status == 2
    assert "--trust" in refused.err
    assert pvae(f"evaluate {tmp_path / 'run'} --rows 2 --samples 2 --refine-steps 1 --trust").status == 0
