"""What docs and README say of commands and components is so."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from pvae.cli.app import app
from pvae.generative import likelihoods
from pvae.recipes.recipe import Recipe, resolve
from pvae.recipes.registry import KINDS

ROOT = Path(__file__).parents[1]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/how-to.md")}
COMMANDS = [
    line.partition(" #")[0].strip()
    for text in TEXTS.values()
    for line in text.splitlines()
    if line.startswith("    pvae ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_command_can_be_given(line):
    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments)
    for word in arguments:
        file = re.match(r"(models|examples)/[\w-]+\.\w+", word)
        assert file is None or (ROOT / file[0]).is_file()


def test_table_of_likelihoods_is_what_the_classes_state():
    lines = re.findall(
        r"^\| (\w+) \| .* \| (mass|density) \| (\w+).* \| (\w+) \|$", TEXTS["docs/how-to.md"], re.MULTILINE
    )
    stated = {name: rest for name, *rest in lines}
    assert list(stated) == likelihoods.__all__
    for name, (measure, outputs, pictures) in stated.items():
        made = getattr(likelihoods, name)()
        assert (measure, pictures) == (made.base_measure, resolve(Recipe(likelihood=name)).binarize)
        assert made.params_per_value == (made.levels if outputs == "levels" else int(outputs))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "program"])
def test_readme_names_every_component(kind):
    for name in KINDS[kind].__all__:
        assert re.search(rf"\b{name}\b", TEXTS["README.md"])


def test_how_to_names_every_key_of_a_recipe():
    for name in Recipe.__dataclass_fields__:
        assert f"`{name}`" in TEXTS["docs/how-to.md"]


def test_links_lead_somewhere():
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


def test_the_documents_rules_are_those_of_the_verdict():
    from pvae.diagnostics.trust import RULES

    text = (ROOT / "docs" / "diagnosis.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.count(" | ") == 5 and line.startswith("| ")]
    told = {(cells[0].removeprefix("| "), cells[1]): cells for cells in lines if cells[1] != "figure"}
    assert list(told) == [(rule.use, rule.figure) for rule in RULES]
    for rule in RULES:
        _, _, low, high, along, source = told[rule.use, rule.figure]
        assert source.removesuffix(" |") == rule.source
        assert low.strip() in ("", f"{rule.low:g}")
        assert high.strip() in ("", f"{rule.high:g}")
        assert low.strip() or high.strip()
        assert along.strip() == ("" if rule.along is None else f"{rule.along[0]} above {rule.along[2]:g}")


def test_the_documents_budgets_are_those_of_the_commands():
    from pvae.diagnostics.battery import DIAGNOSIS_BUDGETS
    from pvae.experiments.compare import BUDGETS

    text = (ROOT / "docs" / "diagnosis.md").read_text()
    for word, (rows, budget) in BUDGETS.items():
        plan = DIAGNOSIS_BUDGETS[word]
        evaluated = f"{rows}, {budget.K}, {budget.steps}"
        diagnosed = (
            f"{plan.rows}, {plan.draws}, {plan.steps}; {plan.annealed} x {plan.temperatures} x {plan.chains}; "
            f"{plan.simulated}; {plan.references} x {plan.length}"
        )
        assert f"| {word} | {evaluated} | {diagnosed} |" in text
