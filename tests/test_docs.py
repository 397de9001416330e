"""README and docs state commands, components and Python as they are."""

import ast
import re
import shlex
from pathlib import Path

import pyro
import pytest
import typer

from pvae.cli.app import app
from pvae.diagnostics import battery
from pvae.diagnostics.evaluation import Budget
from pvae.experiments import compare
from pvae.generative import likelihoods
from pvae.recipes.recipe import Recipe, resolve
from pvae.recipes.registry import KINDS
from pvae.runtime.torch_state import seeded

ROOT = Path(__file__).parents[1]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/how-to.md")}
COMMANDS = [
    line.partition(" #")[0].strip()
    for text in TEXTS.values()
    for line in text.splitlines()
    if line.startswith("    pvae ")
]
README_PYTHON = re.findall(r"^```python\n(.*?)^```", TEXTS["README.md"], re.MULTILINE | re.DOTALL)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("line", COMMANDS)
def test_command_can_be_given(line):
    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments)
    for word in arguments:
        file = re.match(r"(models|examples)/[\w-]+\.\w+", word)
        assert file is None or (ROOT / file[0]).is_file()


def test_table_of_likelihoods_agrees_with_the_classes():
    lines = re.findall(
        r"^\| (\w+) \| .* \| (mass|density) \| (\w+).* \| (\w+) \|$", TEXTS["docs/how-to.md"], re.MULTILINE
    )
    stated = {name: rest for name, *rest in lines}
    assert list(stated) == likelihoods.__all__
    for name, (measure, outputs, binarize) in stated.items():
        likelihood = getattr(likelihoods, name)()
        assert (measure, binarize) == (likelihood.base_measure, resolve(Recipe(likelihood=name)).binarize)
        assert likelihood.params_per_value == (likelihood.levels if outputs == "levels" else int(outputs))


def test_readmes_python_runs_as_printed_but_for_smaller_numbers(tmp_path, monkeypatch, capsys, pvae):
    tiny = battery.DiagnosisBudget(4, 40, 2, 2, 5, 2, 20, 2, 20)
    monkeypatch.setitem(battery.DIAGNOSIS_BUDGETS, "quick", tiny)
    monkeypatch.setitem(compare.BUDGETS, "standard", (4, Budget(K=5, steps=2)))
    monkeypatch.chdir(tmp_path)
    assert pvae("fit --data digits --epochs 1 --out runs/digits").status == 0
    program = "".join(README_PYTHON)
    for printed, smaller in (("epochs=150", "epochs=1"), ("rows=300", "rows=4"), ("[:300]", "[:4]")):
        assert printed in program
        program = program.replace(printed, smaller)
    with seeded(0), pyro.get_param_store().scope():
        exec(compile(program, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "Estimate(mean=" in printed
    assert "Diagnosis of 4 rows" in printed
    assert "rows x 9 columns]" in printed
    assert "torch.Size([359, 8]) torch.Size([5, 64])" in printed
    assert (tmp_path / "gaps.png").is_file()


@pytest.mark.parametrize(
    "text", [*README_PYTHON[:1], *(path.read_text(encoding="utf-8") for path in EXAMPLES)], ids=lambda text: text[:30]
)
def test_readme_and_examples_import_pvae_and_at_most_two_more_of_its_names(text):
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    names = [
        (node.module, alias.name)
        for node in imports
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (node.module or "").partition(".")[0] == "pvae"
    ]
    assert "pvae" in modules
    assert not [module for module in modules if module.startswith("pvae.")]
    assert len(names) <= 2, names


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
        assert along.strip() == _condition(rule)


def _condition(rule):
    """What a rule needs beside its figure, or that it only withholds trust."""
    if rule.along is None:
        return "" if rule.condemns else "withholds trust"
    name, least, most = rule.along
    return f"{name} above {most:g}" if most < 1 else f"{name} below {least:g}"


def test_the_documents_budgets_are_those_of_the_commands():
    from pvae.diagnostics.battery import DIAGNOSIS_BUDGETS
    from pvae.experiments.compare import BUDGETS

    text = (ROOT / "docs" / "diagnosis.md").read_text()
    for word, (rows, budget) in BUDGETS.items():
        plan = DIAGNOSIS_BUDGETS[word]
        evaluated = f"{rows}, {budget.K}, {budget.steps}"
        diagnosed = (
            f"{plan.rows}, {plan.draws}, {plan.steps}; {plan.annealed} x {plan.temperatures} x {plan.chains}; "
            f"{plan.simulated}; {plan.references} x {plan.reference_draws}"
        )
        assert f"| {word} | {evaluated} | {diagnosed} |" in text
