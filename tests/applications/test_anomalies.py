"""Anomaly scores against closed forms, rates of false alarms that hold for any score, ROC areas that are known."""

import math

import numpy as np
import pytest
import torch
from oracles import LinearGaussian
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from torch import nn

from pvae.applications.anomalies import SCORES, AnomalyScores, auroc, detect_anomalies
from pvae.errors import Incompatible, UserError
from pvae.generative.effect_handlers import mask_missing
from pvae.generative.networks import ImputeMeans
from pvae.inference.families import Delta, DiagonalNormal, FlowFamily
from pvae.inference.guides import Amortized

LATENT, COLUMNS, REFERENCE, ROWS = 3, 6, 999, 4000


class Best(nn.Module):
    """An encoder to the best q_params of every row."""

    def __init__(self, oracle):
        super().__init__()
        self.best = oracle.best

    def forward(self, x):
        return self.best(x)


def amortized(oracle):
    return Amortized(Best(oracle), DiagonalNormal(oracle.weight.shape[1]))


@pytest.fixture(scope="module")
def oracle():
    return LinearGaussian(LATENT, COLUMNS, scale=0.4)


@pytest.fixture(scope="module")
def found(oracle):
    """Scores of fresh normal rows, and these rows."""
    x = oracle.sample(ROWS, seed=1)
    return detect_anomalies(oracle.model, amortized(oracle), x, reference=oracle.sample(REFERENCE, seed=2)), x


def of(scores, reference, false_alarm=0.05):
    return AnomalyScores({"s": scores}, {"s": reference}, false_alarm, 1, {})


def test_under_the_exact_posterior_the_evidence_score_is_exact(oracle):
    x = oracle.sample(50)
    found = detect_anomalies(
        oracle.model, oracle.posterior, x, reference=oracle.sample(30, seed=1), K=2, false_alarm=0.1
    )
    for name in ("evidence", "elbo"):
        assert (found.scores[name] + oracle.evidence(x)).abs().max() < 1e-3  # float32
    assert (found.reference["evidence"] + oracle.evidence(oracle.sample(30, seed=1))).abs().max() < 1e-3
    assert set(found.left_out) == {"distance", "neighbours"}
    with pytest.raises(UserError, match="the guide has no family whose means are codes"):
        found.flagged("distance")


def test_bounds_of_other_proposals_are_theirs_within_their_error(oracle, found):
    found, x = found
    # The mean of K draws' log-weights, whose variance is at most twice the gap where q is near; 4000 rows.
    elbo = -oracle.elbo(oracle.best(x), x)
    assert abs((found.scores["elbo"] - elbo).mean()) < 4 * math.sqrt(3 * oracle.gap / found.K / ROWS)
    lost = found.scores["evidence"] + oracle.evidence(x)
    assert 0 < lost.mean() < oracle.gap / 2
    assert (found.scores["evidence"] < found.scores["elbo"] + 1e-6).all()
    residual = oracle.elbo(oracle.best(x), x).mean() + found.scores["reconstruction"].mean()
    assert residual < 0  # what is left out is -KL


def mahalanobis(row, codes):
    apart, covariance = row - codes.mean(0), codes.T.cov()
    return apart @ torch.linalg.solve(covariance, apart)


def test_distances_leave_a_reference_row_itself_out(oracle):
    x, reference = oracle.sample(20, seed=3), oracle.sample(60, seed=4)
    found = detect_anomalies(oracle.model, amortized(oracle), x, reference=reference, K=1)
    codes, own = oracle.mean(reference), oracle.mean(x)
    others = [torch.cat([codes[:i], codes[i + 1 :]]) for i in range(60)]
    fifth = [(each - row).norm(dim=1).sort().values[4] for each, row in zip(others, codes, strict=True)]
    assert torch.allclose(found.reference["neighbours"], torch.stack(fifth), atol=1e-4)
    assert torch.allclose(found.scores["neighbours"], torch.cdist(own, codes).sort().values[:, 4], atol=1e-4)
    left = torch.stack([mahalanobis(row, each) for row, each in zip(codes, others, strict=True)])
    assert torch.allclose(found.reference["distance"], left, rtol=0.02)  # the ridge is a thousandth
    assert torch.allclose(found.scores["distance"], torch.stack([mahalanobis(row, codes) for row in own]), rtol=0.02)
    kept = torch.stack([mahalanobis(row, codes) for row in codes])
    assert not torch.allclose(found.reference["distance"], kept, rtol=0.02)


@pytest.mark.parametrize("name", SCORES)
def test_fresh_normal_rows_raise_the_stated_share_of_alarms(found, name):
    found, _ = found
    share, expected = found.flagged(name).double().mean().item(), found.expected
    assert expected.mean == pytest.approx(0.05)
    spread = math.hypot(expected.se, math.sqrt(0.05 * 0.95 / ROWS))
    assert abs(share - expected.mean) < 4 * spread


@pytest.mark.parametrize("name", SCORES)
def test_rows_of_another_kind_are_found(oracle, found, name):
    found, _ = found
    other = LinearGaussian(LATENT, COLUMNS, scale=0.4, seed=9).sample(200)
    mixed = torch.cat([oracle.sample(200, seed=7), other])
    asked = detect_anomalies(
        oracle.model, amortized(oracle), mixed, reference=oracle.sample(REFERENCE, seed=2), scores=[name]
    )
    assert torch.equal(asked.reference[name], found.reference[name])
    figures = asked.summary(torch.arange(400) >= 200)
    assert figures[f"auroc[{name}]"].mean > 0.7
    assert figures[f"detected[{name}]"].mean > 0.2
    assert figures[f"false_alarms[{name}]"].mean < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 200)


@pytest.mark.parametrize(("R", "rate"), [(19, 0.05), (99, 0.1), (150, 0.1), (50, 0.5)])
def test_over_many_references_the_rate_and_its_spread_are_those_stated(R, rate):
    random = torch.Generator().manual_seed(0)
    # A score that is uniform: the share above a threshold is 1 minus it.
    repeats = [of(torch.zeros(1), torch.rand(R, generator=random), rate) for _ in range(3000)]
    shares, expected = torch.tensor([1 - each.thresholds["s"] for each in repeats]), repeats[0].expected
    assert expected.mean <= rate + 1e-12
    assert abs(shares.mean() - expected.mean) < 4 * expected.se / math.sqrt(3000)
    assert shares.std() == pytest.approx(expected.se, rel=0.1)


@pytest.mark.parametrize("R", [19, 20, 57, 200])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_a_row_is_flagged_where_its_p_value_is_at_most_the_rate(R, rate):
    random = torch.Generator().manual_seed(R)
    draw = lambda n: torch.randint(40, (n,), generator=random).double()  # noqa: E731, with many ties
    found = of(draw(500), draw(R), rate)
    assert torch.equal(found.flagged("s"), found.p_values("s") <= rate + 1e-9)
    assert found.flagged("s").double().mean() <= rate + 5 * math.sqrt(rate / R)


def test_p_values_of_normal_rows_are_no_smaller_than_uniform_ones():
    random = torch.Generator().manual_seed(0)
    p = torch.cat(
        [of(torch.rand(1, generator=random), torch.rand(39, generator=random)).p_values("s") for _ in range(4000)]
    )
    for level in (0.025, 0.05, 0.25, 0.5):
        share = (p <= level + 1e-9).double().mean()
        assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / 4000)


def test_the_roc_area_of_two_normals_is_known():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(3000) < 1000
    found = auroc(torch.randn(3000, generator=random) + 1.2 * labels, labels)
    assert abs(found.mean - norm.cdf(1.2 / math.sqrt(2))) < 4 * found.se
    assert found.se < 0.01
    assert abs(auroc(torch.randn(3000, generator=random), labels).mean - 0.5) < 4 * 0.0112  # sqrt(1 / 12 (1/m + 1/n))


def test_the_error_of_the_roc_area_is_its_spread():
    random, labels = torch.Generator().manual_seed(0), torch.arange(150) < 50
    found = [auroc(torch.randn(150, generator=random) + labels, labels) for _ in range(400)]
    spread = np.std([each.mean for each in found])
    assert np.mean([each.se for each in found]) == pytest.approx(spread, rel=0.15)  # 4 of the 0.035 of 400 repeats


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_the_roc_area_is_that_of_others_and_ties_count_by_half(levels):
    random, labels = torch.Generator().manual_seed(levels), torch.arange(300) % 3 == 0
    scores = torch.randint(levels, (300,), generator=random) + labels.long()
    assert auroc(scores, labels).mean == pytest.approx(roc_auc_score(labels, scores))
    assert auroc(torch.zeros(300), labels).mean == 0.5


def test_too_likely_rows_are_seen_by_typicality_and_not_by_evidence():
    oracle = LinearGaussian(2, 60)
    x = torch.cat([oracle.sample(100, seed=1), oracle.bias.float().expand(100, -1)])  # at the density's top
    found = detect_anomalies(oracle.model, amortized(oracle), x, reference=oracle.sample(200, seed=2))
    figures = found.summary([0] * 100 + [1] * 100)
    assert figures["auroc[evidence]"].mean < 0.01
    assert figures["detected[evidence]"].mean == 0
    assert figures["detected[typicality]"].mean == 1


def test_point_masses_have_no_evidence_and_say_so(oracle):
    guide = Amortized(nn.Linear(COLUMNS, LATENT), Delta(LATENT))
    found = detect_anomalies(oracle.model, guide, oracle.sample(9), reference=oracle.sample(40))
    assert set(found.scores) == {"reconstruction", "distance", "neighbours"}
    assert set(found.left_out) == {"evidence", "elbo", "typicality"}
    with pytest.raises(UserError, match="there is no score 'evidence' "):
        found.p_values("evidence")
    with pytest.raises(Incompatible, match="no score is left: a guide of point masses bounds no evidence"):
        detect_anomalies(oracle.model, guide, oracle.sample(9), reference=oracle.sample(40), scores=["elbo"])


def test_a_family_without_a_mean_gives_codes_by_draws(oracle):
    family = FlowFamily(LATENT, hidden=[8], bins=4, context=2)
    guide = Amortized(nn.Linear(COLUMNS, family.num_params), family)
    found = detect_anomalies(oracle.model, guide, oracle.sample(9), reference=oracle.sample(40))
    assert set(found.scores) == set(SCORES)
    assert found.scores["neighbours"].isfinite().all()


def test_a_score_that_is_no_number_is_flagged(oracle):
    x = oracle.sample(5)
    x[2, 0] = torch.nan
    found = detect_anomalies(oracle.model, oracle.posterior, x, reference=oracle.sample(200, seed=1), false_alarm=0.01)
    assert found.flagged("evidence").tolist() == [False, False, True, False, False]
    assert found.p_values("evidence")[2] == 1 / 201


def test_shares_of_missing_entries_tell_whether_rows_compare(oracle):
    x, reference = oracle.sample(30), oracle.sample(99, seed=1)
    holes, alike = (each.clone() for each in (x, x))
    holes[:10, :4], alike[:, 1] = torch.nan, torch.nan
    model = mask_missing(oracle.model)
    guide = Amortized(ImputeMeans(Best(oracle), torch.zeros(COLUMNS)), DiagonalNormal(LATENT))
    whole = detect_anomalies(model, guide, x, reference=reference)
    assert whole.comparable
    found = detect_anomalies(model, guide, holes, reference=reference)
    assert not found.comparable
    assert found.missing[0].tolist() == pytest.approx(10 * [4 / COLUMNS] + 20 * [0.0])
    assert found.missing[1].equal(torch.zeros(99, dtype=torch.double))
    assert not detect_anomalies(model, guide, alike, reference=reference).comparable
    both = reference.clone()
    both[:, 5] = torch.nan
    assert detect_anomalies(model, guide, alike, reference=both).comparable
    # Why it matters: rows that miss more seem more normal, though they are drawn alike.
    assert (found.p_values("reconstruction")[:10].mean() > whole.p_values("reconstruction").mean() + 0.2).item()


def test_rows_are_counted_and_draws_are_fixed_by_the_seed(oracle):
    done, x, reference = [], oracle.sample(30), oracle.sample(40, seed=1)

    def scored(seed, progress=lambda rows: None):
        return detect_anomalies(
            oracle.model, amortized(oracle), x, reference=reference, seed=seed, progress=progress
        ).scores

    first = scored(1, done.append)["elbo"]
    assert sum(done) == 70
    assert torch.equal(first, scored(1)["elbo"])
    assert not torch.equal(first, scored(2)["elbo"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"false_alarm": 0.0}, "false_alarm is 0.0, but it must be between 0 and 1"),
        ({"false_alarm": 1.0}, "must be between 0 and 1"),
        ({"false_alarm": 0.01}, "40 reference rows are too few for a false-alarm rate of 0.01; give 99 or more"),
        ({"scores": ["evidense"]}, "unknown score 'evidense'; did you mean 'evidence'"),
        ({"scores": []}, "no score is left: none was given"),
        ({"K": 0}, "K is 0, but it must be positive"),
        ({"reference": torch.zeros(40)}, "a table .rows, columns. is needed"),
    ],
)
def test_wrong_options_are_mistakes_of_the_user(oracle, change, said):
    with pytest.raises(UserError, match=said):
        detect_anomalies(oracle.model, amortized(oracle), oracle.sample(5), **{"reference": oracle.sample(40)} | change)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([True, False], "labels must be 3 truth values"),
        ([0, 1, 2], "labels must be 3 truth values"),
        ([True, True, True], "all rows are anomalous; an AUROC needs rows of both kinds"),
        ([0, 0, 0], "all rows are normal"),
    ],
)
def test_labels_that_do_not_fit_are_mistakes_of_the_user(labels, said):
    with pytest.raises(UserError, match=said):
        of(torch.arange(3.0), torch.arange(40.0)).summary(labels)


def test_asking_for_another_score_names_those_there_are():
    with pytest.raises(UserError, match=r"there is no score 't' \(known: s\)"):
        of(torch.arange(3.0), torch.arange(40.0)).p_values("t")
