"""Tables of the verdict's error rates, from the lines that the runner wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from scipy.stats import beta

from .guides import GUIDES
from .kinds import KINDS
from .truths import USES

Line = dict[str, Any]
TRUST, REFINE, DISTRUST = "trust", "trust with refinement", "don't trust"
OUTCOMES = ("false trust", "false distrust", "not established")
BORDER = 0.15  # margin of the truth, as a share of its limit, within which a case is called borderline


def outcome(line: Line, use: str) -> str:
    """Return what a verdict was: right, false trust, false distrust, or not established.

    Trust with refinement is right if the guide is wrong and the best of its family is right; it is a false distrust if
    the guide itself is right, and a false trust if not even the best of its family is.
    """
    level, right, after = line["levels"].get(use, ""), line["truth"][use], line["refined_truth"][use]
    if level == TRUST:
        return "right" if right else "false trust"
    if level == REFINE:
        return "false distrust" if right else "right" if after else "false trust"
    if level == DISTRUST:
        return "false distrust" if right else "right"
    return "not established"


def upper_limit(count: int, of: int, level: float = 0.95) -> float:
    """Return the one-sided Clopper-Pearson limit of a share.

    >>> round(upper_limit(0, 299), 4)
    0.01
    """
    return 1.0 if count >= of else float(beta.ppf(level, count + 1, of - count))


def page(lines: list[Line]) -> str:
    """Return the tables as Markdown: totals, rivals, then by use, kind and guide, and the cases that went wrong."""
    budgets = sorted({line["budget"] for line in lines}, key=["quick", "standard", "thorough"].index)
    parts = []
    for budget in budgets:
        of_budget = [line for line in lines if line["budget"] == budget]
        parts += [f"## Budget {budget}: {len(USES) * len(of_budget)} verdicts", _totals(of_budget), _rivals(of_budget)]
        parts += [_by("kind", list(KINDS), of_budget), _by("guide", list(GUIDES), of_budget), _wrong(of_budget)]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _share(count: int, of: int) -> str:
    return f"{count} of {of} ({count / of:.1%}, at most {upper_limit(count, of):.1%})" if of else "none"


def _totals(lines: list[Line]) -> str:
    """False trust of all verdicts, false distrust of those that deserve trust, none of all."""

    def row(name: str, uses: tuple[str, ...]) -> list[str]:
        verdicts = [(outcome(line, use), line["truth"][use]) for line in lines for use in uses]
        right = [result for result, fine in verdicts if fine]
        counts = [sum(result == name for result, _ in verdicts) for name in OUTCOMES]
        return [
            name,
            _share(counts[0], len(verdicts)),
            _share(counts[1], len(right)),
            _share(counts[2], len(verdicts)),
        ]

    return _table(["use", *OUTCOMES], [row(use, (use,)) for use in USES] + [row("all", USES)])


def _rivals(lines: list[Line]) -> str:
    """What one diagnostic alone would have had one conclude of the posterior, on the same cases."""
    rows = []
    for name in ("k-hat", "SBC", "R-hat"):
        pairs = [(line["rivals"][name], line["truth"]["posterior"]) for line in lines if name in line["rivals"]]
        right = sum(fine for _, fine in pairs)
        false_trust = sum(says and not fine for says, fine in pairs)
        rows.append([f"{name} alone", _share(false_trust, len(pairs)), _share(_wary(pairs), right)])
    return _table(["posterior, by", "false trust", "false distrust"], rows)


def _wary(pairs: list[tuple[bool, bool]]) -> int:
    return sum(fine and not says for says, fine in pairs)


def _by(what: str, names: list[str], lines: list[Line]) -> str:
    """Return counts of false trust / false distrust / not established of each kind or guide, by use."""
    rows = []
    for name in names:
        group = [line for line in lines if line[what] == name]
        if group:
            rows.append([name, str(len(group)), *(_counts(group, use) for use in USES)])
    return _table([what, "cases", *USES], rows)


def _counts(lines: list[Line], use: str) -> str:
    results = [outcome(line, use) for line in lines]
    return " / ".join(str(results.count(name)) for name in OUTCOMES)


def _wrong(lines: list[Line]) -> str:
    """List the cases of false trust, and by what margin the truth was outside its limits."""
    rows = [
        [line["kind"], str(line["seed"]), line["guide"], use, f"{line['margins'][use]:+.2f}", _border(line, use)]
        for line, use in _cases(lines, lambda line, use: outcome(line, use) == "false trust")
    ]
    head = ["false trust: kind", "instance", "guide", "use", "margin", ""]
    return _table(head, rows) if rows else "No verdict was a false trust."


def _border(line: Line, use: str) -> str:
    return "borderline" if abs(line["margins"][use]) < BORDER else ""


def _cases(lines: list[Line], that: Callable[[Line, str], bool]) -> Iterator[tuple[Line, str]]:
    return ((line, use) for line in lines for use in USES if that(line, use))
