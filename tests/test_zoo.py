"""The zoo's answers against brute force, its guides against their names, and a slice of its runner."""

import json
import math

import pytest
import torch
from zoo import GUIDES, KINDS, Truth, make_guide, make_kind, truth
from zoo.blocks import Hard, Normals
from zoo.guides import applies
from zoo.page import outcome, page, upper_limit
from zoo.runner import list_cases, read, run
from zoo.search import maximize

import pvae
from pvae.diagnostics import Budget
from pvae.runtime.torch_state import seeded
from pvae.samplers import LogJoint

ROWS = 12


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request):
    return make_kind(request.param, seed=1)


def test_log_joint_is_the_programs(kind):
    u, x = kind.simulate(ROWS, seed=3)
    target = LogJoint(kind.model, x, None, kind.sites)
    with torch.no_grad():
        torch.testing.assert_close(target(u[None])[0].double(), kind.log_joint(u, x), rtol=1e-4, atol=1e-3)


def test_evidence_is_the_mean_weight_of_a_wide_proposal(kind):
    """Importance sampling from Student-t draws of posterior moments: standard error by the weights' own spread."""
    x, K, df = kind.rows(ROWS, seed=4), 20_000, 4.0
    mean, covariance = kind.covariance(x)
    if kind.dim > 12:
        assert torch.allclose(kind.evidence(x), _normal_evidence(kind, x), atol=1e-8)
        return
    with seeded(0):
        e = torch.randn(K, ROWS, kind.dim, dtype=torch.double)
        root = 1.3 * torch.linalg.cholesky(covariance)
        chi = torch.distributions.Chi2(torch.tensor(df).double()).sample((K, ROWS))
    u = mean + torch.einsum("bij,sbj->sbi", root, e / (chi / df).sqrt().unsqueeze(-1))
    constant = math.lgamma((df + kind.dim) / 2) - math.lgamma(df / 2) - kind.dim / 2 * math.log(df * math.pi)
    square = (e / (chi / df).sqrt().unsqueeze(-1)).square().sum(-1)
    log_q = constant - (df + kind.dim) / 2 * torch.log1p(square / df) - torch.logdet(root)
    weights = (kind.log_joint(u, x) - log_q - kind.evidence(x)).exp()
    error = (weights.mean(0) - 1) / (weights.std(0) / K**0.5)
    assert error.abs().max() < 4.5
    assert (weights.std(0) / K**0.5).median() < 0.05  # a mistake of a tenth of a nat would show


def _normal_evidence(kind, x):
    (block,) = kind.blocks
    covariance = block.weight @ block.weight.T + block.scale**2 * torch.eye(kind.columns).double()
    normal = torch.distributions.MultivariateNormal(torch.zeros(kind.columns).double(), covariance)
    return normal.log_prob(x.double())


@pytest.mark.parametrize("name", ["linear, D = 6", "ridge"])
def test_evidence_of_linear_kinds_is_the_marginal_normals(name):
    kind = make_kind(name, seed=4)
    x = kind.rows(ROWS)
    torch.testing.assert_close(kind.evidence(x), _normal_evidence(kind, x), rtol=0, atol=1e-8)


def test_quadrature_is_exact_to_a_millionth(kind):
    """Another rule, Gauss-Legendre on 40 pieces, gives the same evidence and mean of the hard coordinate."""
    from numpy.polynomial.legendre import leggauss

    x, start = kind.rows(ROWS).double(), 0
    for block in kind.blocks:
        columns, start = x[:, start : start + block.columns], start + block.columns
        if isinstance(block, Hard):
            t = block.grid(columns).t
            ends = t[0] + (t[-1] - t[0]) * torch.linspace(0, 1, 401).double().unsqueeze(-1)
            if block.sinh:
                ends = (t[0].asinh() + (t[-1].asinh() - t[0].asinh()) * torch.linspace(0, 1, 401)[:, None]).sinh()
            nodes, weights = (torch.tensor(v).double() for v in leggauss(12))
            half = (ends[1:] - ends[:-1]) / 2
            points = (ends[:-1] + half + half * nodes[:, None, None]).flatten(0, 1)
            log_w = (half.log() + weights.log()[:, None, None]).flatten(0, 1)
            evidence = (block.log_t(points, columns) + log_w).logsumexp(0)
            torch.testing.assert_close(evidence, block.evidence(columns), rtol=0, atol=1e-6)


def test_draws_have_the_posteriors_moments(kind):
    x, S = kind.rows(ROWS, seed=5), 4000
    mean, sd = kind.moments(x)
    with seeded(1):
        u = kind.sample(x, S)
    z = (u.mean(0) - mean) / sd * S**0.5
    # A chi-square of ROWS * D terms over its number, or nearly so where dimensions correlate.
    assert abs(z.square().mean() - 1) < 5 * (2 / ROWS) ** 0.5
    if kind.name != "heavy tails":  # whose draws' variance has none itself
        assert (u.std(0) / sd).log().median().abs() < 0.02


@pytest.mark.parametrize("diagonal", [True, False])
def test_the_best_normal_cannot_be_beaten(kind, diagonal):
    """Random moves, near and far, lose, and the ELBO is below the evidence."""
    x = kind.rows(ROWS, seed=6)
    q = kind.best(diagonal, x)
    elbo, generator = kind.elbo(q, x), torch.Generator().manual_seed(0)
    assert (elbo <= kind.evidence(x) + 1e-6).all()
    for size in (0.01, 0.1, 1.0):
        for _ in range(4):
            shift, stretch, shear = (
                size * torch.randn(s, generator=generator).double() for s in (q.mean.shape, q.mean.shape, q.root.shape)
            )
            shear = 0 * shear if diagonal else shear.tril(-1) / kind.dim
            root = q.root @ (torch.eye(kind.dim) + shear) * stretch.exp().unsqueeze(-1)
            moved = Normals(q.mean + shift * q.sd, root)
            assert (kind.elbo(moved, x) <= elbo + 1e-5).all()


def test_the_elbo_is_the_mean_of_log_weights(kind):
    x, S = kind.rows(ROWS, seed=6), 2000
    q = kind.best(False, x)
    with seeded(2):
        u = q.mean + torch.einsum("bij,sbj->sbi", q.root, torch.randn(S, *q.mean.shape).double())
    values = kind.log_joint(u, x)
    error = (values.mean(0) + q.entropy - kind.elbo(q, x)) / (values.std(0) / S**0.5 + 1e-9)
    assert error.abs().max() < 5


def test_maximize_finds_a_narrow_bent_maximum():
    p = maximize(lambda p: -((1 - p[:, 0]) ** 2) - 20 * (p[:, 1] - p[:, 0] ** 2) ** 2, torch.zeros(3, 2).double())
    torch.testing.assert_close(p, torch.ones(3, 2).double(), rtol=0, atol=1e-3)


EXACT = {"mean_error": 0.0, "sd_ratio": 1.0, "coverage_90": 0.9, "inference_gap": 0.0}


@pytest.mark.parametrize(
    ("guide", "figures", "wrong"),
    [
        ("exact", EXACT, set()),
        ("best full-rank", EXACT, set()),
        (
            "narrowed",
            {"sd_ratio": 0.5, "coverage_90": 0.589, "inference_gap": 2 * (math.log(2) - 3 / 8)},
            {"posterior"},
        ),
        ("widened", {"sd_ratio": 2.0, "coverage_90": 0.999, "inference_gap": 2 * 0.806853}, {"posterior", "bound"}),
        ("shifted widest", {"mean_error": 2**0.5, "inference_gap": 2.0}, {"posterior", "bound", "proposal"}),
        ("shifted narrowest", {"mean_error": 2**0.5, "inference_gap": 2.0}, {"posterior", "bound", "proposal"}),
    ],
)
def test_truths_of_two_linear_gaussian_dimensions(guide, figures, wrong):
    """By hand: an sd times c costs (c^2 - 1) / 2 - log c nats a dimension, a shift of 2 sds in a direction 2 nats."""
    kind = make_kind("linear, D = 2", seed=0)  # a sphere, where a direction's shift is one of every mix of axes
    real = truth(kind, make_guide(kind, guide))
    for name, value in figures.items():
        # 2000 rows of 2 dimensions: a share's standard error is at most 0.008.
        assert real.figures[name] == pytest.approx(value, abs=0.03 if name == "coverage_90" else 1e-3), name
    assert {use for use, right in real.trustworthy.items() if not right} >= wrong - {"proposal"}
    assert real.trustworthy["model"]
    if not wrong:
        assert all(real.trustworthy.values())
    assert real.figures["sbc_distance"] == pytest.approx(
        {"narrowed": 0.165, "widened": 0.18}.get(guide, real.figures["sbc_distance"]), abs=0.04
    )


def test_a_second_mode_has_its_weight_in_every_row():
    kind = make_kind("second mode of 5%")
    x = kind.rows(ROWS)
    t, log_p, *_ = kind.blocks[0].grid(x[:, :1].double())
    torch.testing.assert_close(
        (log_p.softmax(0) * (t > 0)).sum(0), torch.full((ROWS,), 0.05).double(), atol=1e-6, rtol=0
    )
    q = make_guide(kind, "one mode").family(make_guide(kind, "one mode").params(x))
    assert (q.mean[:, 0] < 0).all()
    assert not truth(kind, make_guide(kind, "one mode"), rows=200).trustworthy["posterior"]


def test_condition_numbers():
    for seed, condition in enumerate([1, 10, 100, 1000, 10_000]):
        values = torch.linalg.eigvalsh(make_kind("linear, D = 12", seed).blocks[0].precision)
        assert (values[-1] / values[0]).item() == pytest.approx(condition, rel=1e-6)


def test_misspecified_data_do_not_come_from_the_model():
    kind = make_kind("misspecified scale")
    assert not truth(kind, make_guide(kind, "exact"), rows=200).trustworthy["model"]
    assert kind.rows(2000).std() / kind.simulate(2000)[1].std() == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("name", [name for name in GUIDES if name != "trained"])
def test_guides_serve_any_rows_and_count(name):
    kind = make_kind("counts" if name == "exploding" else "x = z^2")
    if not applies(kind, name):
        pytest.skip("not of this kind")
    guide, x = make_guide(kind, name), kind.rows(8)
    q = guide.family(guide.params(x))
    assert q.sample((3,)).shape == (3, 8, kind.dim)
    torch.testing.assert_close(guide.params(x)[2:5], guide.params(x[2:5]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guide", ["exact", "best diagonal"])
def test_programs_and_guides_have_the_exact_elbo(kind, guide):
    """Of the exact posterior every weight is the evidence; of Gaussians the mean over 500 draws is near their ELBO."""
    x = kind.rows(ROWS, seed=6)
    values = pvae.diagnostics.bounds(kind.model, make_guide(kind, guide), x, K=500).values
    if guide == "exact":
        torch.testing.assert_close(values["elbo"].double(), kind.evidence(x), rtol=1e-4, atol=2e-3)
    else:
        error = values["elbo"].double() - kind.elbo(kind.best(True, x), x)
        assert error.abs().max() < 5 * max(values["elbo_se"].max().item(), 1e-3)


def test_a_kind_can_be_evaluated():
    kind = make_kind("ridge")
    x = kind.rows(6)
    evaluation = pvae.evaluate(kind.model, make_guide(kind, "best diagonal"), x, budget=Budget(50, 2))
    assert math.isfinite(evaluation.summary()["inference_gap"].mean)


def _line(level, right, after):
    return {"levels": {"bound": level}, "truth": {"bound": right}, "refined_truth": {"bound": after}}


@pytest.mark.parametrize(
    ("level", "right", "after", "result"),
    [
        ("trust", True, True, "right"),
        ("trust", False, True, "false trust"),
        ("trust with refinement", False, True, "right"),
        ("trust with refinement", False, False, "false trust"),
        ("trust with refinement", True, True, "false distrust"),
        ("don't trust", True, True, "false distrust"),
        ("don't trust", False, False, "right"),
        ("not established", False, False, "not established"),
        ("no number", True, True, "not established"),
    ],
)
def test_outcomes(level, right, after, result):
    assert outcome(_line(level, right, after), "bound") == result


def test_upper_limit_of_no_events_is_the_rule_of_three():
    assert upper_limit(0, 1000) == pytest.approx(1 - 0.05 ** (1 / 1000), rel=1e-6)


def test_a_margin_is_negative_outside():
    figures = dict.fromkeys(("mean_error", "sbc_distance", "inference_gap", "weights_fail", "misspecified"), 0.0)
    near = Truth({**figures, "sd_ratio": 1.0, "coverage_90": 0.79})
    assert -0.02 < near.margins["posterior"] < 0
    assert [use for use, right in near.trustworthy.items() if not right] == ["posterior"]


def test_runner_goes_on_where_it_stopped(tmp_path, monkeypatch):
    from zoo import runner

    class Verdict:
        level = "trust"

    class Diagnosis:
        verdicts = dict.fromkeys(("posterior", "proposal", "bound", "model"), Verdict)
        figures = refined = dict[str, float]()  # noqa: RUF012

    monkeypatch.setattr(runner, "chains_from", lambda *about: torch.ones(3))
    monkeypatch.setattr(runner.pvae, "diagnose", lambda *args, **options: Diagnosis)
    cases = list(list_cases(["linear, D = 2"], ["exact", "narrowed"], 1, ["quick"]))
    path = tmp_path / "zoo.jsonl"
    run(cases[:1], path)
    before = path.read_text()
    run(cases, path)
    assert path.read_text().startswith(before)
    assert [line["guide"] for line in read(path)] == ["exact", "narrowed"]
    tables = page(read(path))
    assert "| linear, D = 2 | 0 | narrowed | posterior |" in tables
    json.dumps(read(path))


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["exact", "shifted widest"])
@pytest.mark.parametrize("name", ["linear, D = 2", "two equal modes"])
def test_verdicts_of_a_slice(name, guide, tmp_path):
    """The exact posterior's bound is trusted, and one moved by two standard deviations is not."""
    run(list(list_cases([name], [guide], 1, ["quick"])), tmp_path / "zoo.jsonl")
    (line,) = read(tmp_path / "zoo.jsonl")
    assert outcome(line, "bound") == "right"
