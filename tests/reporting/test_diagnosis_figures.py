"""Figures of a diagnosis: parts that are known are drawn, others are left out, and equal arrays make equal bytes."""

from __future__ import annotations

import base64
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pvae.diagnostics.battery import Bounds, Rows, Weights
from pvae.diagnostics.calibration import Calibration
from pvae.diagnostics.latent_usage import LatentUsage
from pvae.diagnostics.predictive_checks import STATISTICS, PredictiveChecks
from pvae.diagnostics.reference_posterior import ReferencePosterior
from pvae.reporting import diagnosis_figures
from pvae.reporting.diagnosis_figures import DRAWN, draw_diagnosis
from pvae.reporting.latent_figures import draw_aggregate
from pvae.reporting.style import data_uri

GAPS = {"inference": (3.1, 2.9, 3.4), "approximation": (0.9, 0.8, 1.0), "amortization": (2.2, 2.0, 2.5)}
SETTINGS = {
    "D2_B20_table": (2, 20, (5,), False),
    "D8_B300_images": (8, 300, (28, 28), True),
    "D50_B300_images": (50, 300, (28, 28), False),
    "D1_B5_table": (1, 5, (5,), False),
}


def _weights(B: int, shift: float) -> Weights:
    elbo = -90 + 10 * torch.randn(B)
    return Weights(elbo, elbo + 2, 0.45 + shift + 0.2 * torch.randn(B), 50 * torch.rand(B))


def _calibration(N: int, D: int, narrow: float) -> Calibration:
    z = torch.randn(N, D) / narrow
    ranks = torch.distributions.Normal(0, 1).cdf(z)
    return Calibration(ranks, torch.rand(N) ** narrow, z, torch.rand(N, D), torch.tensor(100))


def _reference(B: int, D: int, narrow: float) -> ReferencePosterior:
    mean, sd = torch.randn(B, D), 0.1 + 0.5 * torch.rand(B, D)
    ours = mean + 0.3 * sd * torch.randn(B, D)
    small, reliable = torch.full((B, D), 0.01), torch.arange(B) % 7 > 0
    cover = (0.5 * narrow + 0.02 * torch.randn(B, D)).clamp(0, 1), (0.9 * narrow + 0.02 * torch.randn(B, D)).clamp(0, 1)
    rows = torch.zeros(B), torch.full((B,), 900.0), reliable, torch.full((B,), 2)
    return ReferencePosterior(mean, sd, ours, sd * narrow, small, small, *cover, mean, sd, *rows)


def _health(B: int, D: int) -> LatentUsage:
    decay = torch.exp(-torch.arange(D) / max(D / 5, 1.0))
    one, codes = torch.tensor(0.5), torch.randn(B, D) * (0.7 + 0.3 * torch.rand(D)) + 0.4 * torch.randn(D)
    kl = (2.5 * decay)[torch.randperm(D)]
    numbers = [one] * 9
    return LatentUsage(
        kl, 0.05 * kl, 0.4 * kl**2, *numbers, torch.rand(D), torch.rand(D), one, one, codes, torch.randn(B, D), codes
    )


def _predictive(columns: int) -> PredictiveChecks:
    S = len(STATISTICS)
    replicated = torch.randn(200, S) * 0.01 + torch.linspace(0.1, 0.6, S)
    replicated[:, 4] = 1.0  # the largest of binary values
    observed = replicated.mean(0) + 0.01 * torch.randn(S)
    observed[4] = 1.0
    return PredictiveChecks(torch.rand(columns), torch.rand(S), observed, replicated, torch.zeros(3), torch.zeros(3))


def _found(D: int, B: int, shape: tuple[int, ...], labelled: bool) -> dict[str, Any]:
    """A plausible diagnosis of a guide that is somewhat too narrow."""
    torch.manual_seed(D)
    columns = math.prod(shape)
    lower = -90 + 10 * torch.randn(min(B, 50))
    return {
        "rows": Rows(torch.rand(B, *shape).round(), torch.arange(B) % 10 if labelled else torch.empty(0)),
        "health": _health(B, D),
        "predictive": _predictive(columns),
        "weights-guide": _weights(B, 0.1),
        "weights-best": _weights(B, -0.1),
        "calibration-guide": _calibration(B, D, 0.8),
        "calibration-best": _calibration(B, D, 1.0),
        "sandwich": Bounds(lower, lower + 0.3 * torch.rand(len(lower)) - 0.02, lower + 0.01),
        "reference-guide": _reference(min(B, 50), D, 0.8),
        "reference-best": _reference(min(B, 50), D, 0.95),
        "gaps": GAPS | {"FullRankNormal would win": (0.3, 0.2, 0.4)},
    }


def _drawn(parts: dict[str, Any], shape: tuple[int, ...]) -> dict[str, str]:
    return {name: data_uri(figure) for name, figure in draw_diagnosis(parts, shape).items()}


def _content(address: str) -> bytes:
    return base64.b64decode(address.partition(",")[2])


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    return _found(*SETTINGS["D2_B20_table"])


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_panel_is_drawn_from_every_kind_of_run(setting: str) -> None:
    D, B, shape, labelled = SETTINGS[setting]
    drawn = _drawn(_found(D, B, shape, labelled), shape)
    assert list(drawn) == list(DRAWN)
    for address in drawn.values():
        start = b"\x89PNG" if address.startswith("data:image/png;base64,") else b"<?xml"
        assert _content(address).startswith(start)
        assert len(address) < 1_000_000


def test_the_page_shows_every_panel() -> None:
    template = (Path(diagnosis_figures.__file__).parent / "templates" / "report.html.jinja").read_text()
    assert re.findall(r'figure\(diagnosis\.panels, "(\w+)", "[A-Z]', template) == list(DRAWN)


def test_a_panel_whose_part_is_absent_is_left_out(small: dict[str, Any]) -> None:
    assert draw_diagnosis({}, (5,)) == {}
    drawn_from = {
        "gaps": ("gaps",),
        "k_hat": ("weights-guide", "weights-best"),
        "reference": ("reference-guide", "reference-best"),
        "calibration": ("calibration-guide", "calibration-best"),
        "kl": ("health",),
        "aggregate": ("health",),
        "predictive": ("predictive",),
        "sandwich": ("sandwich",),
    }
    assert drawn_from.keys() == DRAWN.keys()
    for part in ("rows", *{p for parts in drawn_from.values() for p in parts}):
        drawn = draw_diagnosis({part: small[part]}, (5,))
        assert set(drawn) == {name for name, parts in drawn_from.items() if part in parts}


def test_references_of_which_none_is_reliable_make_no_picture(small: dict[str, Any]) -> None:
    bad = {who: replace(small[who], reliable=torch.zeros(20, dtype=torch.bool)) for who in ("reference-guide",)}
    assert draw_diagnosis(bad, (5,)) == {}
    assert set(draw_diagnosis({"reference-guide": small["reference-guide"]}, (5,))) == {"reference"}


def test_numbers_that_are_not_finite_are_borne(small: dict[str, Any]) -> None:
    alike = replace(small["weights-guide"], k_hat=torch.full((20,), -torch.inf))
    assert set(draw_diagnosis({"weights-guide": alike}, (5,))) == {"k_hat"}
    mixed = replace(alike, k_hat=torch.tensor([torch.inf, torch.nan, -torch.inf, 0.3]).repeat(5))
    assert set(draw_diagnosis({"weights-guide": mixed, "rows": small["rows"]}, (5,))) == {"k_hat"}
    unknown = replace(alike, k_hat=torch.full((20,), torch.nan))
    assert draw_diagnosis({"weights-guide": unknown}, (5,)) == {}
    point = replace(small["health"], kl=torch.full((2,), torch.nan), kl_se=torch.full((2,), torch.nan))
    assert set(draw_diagnosis({"health": point}, (5,))) == {"kl", "aggregate"}
    assert draw_diagnosis({"gaps": {"inference": (1.0, math.nan, 2.0)}}, (5,)) == {}


def test_empty_parts_make_no_picture() -> None:
    none = torch.empty(0)
    empty = Calibration(torch.empty(0, 2), none, torch.empty(0, 2), torch.empty(0, 2), torch.tensor(100))
    found = {"sandwich": Bounds(none, none, none), "calibration-guide": empty, "weights-guide": Weights(*[none] * 4)}
    assert draw_diagnosis(found | {"gaps": {}}, (5,)) == {}


def test_a_single_row_is_drawn(small: dict[str, Any]) -> None:
    one = Weights(*[torch.tensor([0.4])] * 4)
    found = {"weights-guide": one, "sandwich": Bounds(torch.tensor([-3.0]), torch.tensor([-2.0]), torch.tensor([-2.9]))}
    found |= {"calibration-guide": _calibration(1, 2, 1.0), "reference-guide": _reference(2, 1, 1.0)}
    assert set(draw_diagnosis(found, (5,))) == {"k_hat", "sandwich", "calibration", "reference"}


def test_the_same_arrays_make_the_same_bytes(small: dict[str, Any]) -> None:
    again = _drawn(small | {"sandwich": replace(small["sandwich"], upper=small["sandwich"].upper + 1)}, (5,))
    first = _drawn(small, (5,))
    assert {name for name, address in first.items() if again[name] != address} == {"sandwich"}
    assert _drawn({"sandwich": small["sandwich"]}, (5,))["sandwich"] == first["sandwich"]


def test_names_are_drawn_as_they_are_written() -> None:
    """Neither a formula that matplotlib can't read nor markup gets out of a gap's name."""
    wild = {
        "<script>alert(1)</script>": (1.0, 0.5, 1.5),
        r"$\frac{$ & _^": (2.0, 1.5, 2.5),
        "x.py:Mine would win": (0, 0, 0),
    }
    picture = _content(_drawn({"gaps": wild}, (5,))["gaps"])
    assert b"<script>" not in picture


def test_classes_are_coloured_only_where_each_code_has_its_label(small: dict[str, Any]) -> None:
    health, x = small["health"], small["rows"].x

    def drawn(**parts: Any) -> str:
        figure = draw_aggregate({"health": health, **parts}, (5,))
        assert figure is not None
        return data_uri(figure)

    classes = torch.arange(20) % 10
    assert drawn(rows=Rows(x, classes)) != drawn()
    assert drawn(rows=Rows(x, classes[:-1])) == drawn()
    assert drawn(rows=Rows(x, torch.arange(20))) == drawn()
