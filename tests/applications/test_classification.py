"""Classification by evidence against Bayes' rule in closed form, temperatures that are known, scores of others."""

import math

import numpy as np
import pytest
import torch
from oracles import LinearGaussian
from sklearn.metrics import confusion_matrix, log_loss
from torch import nn

from pvae.applications.classification import Classification, classify, classify_conditional, fit_temperature
from pvae.errors import Incompatible, UserError
from pvae.inference.families import Delta, DiagonalNormal
from pvae.inference.guides import Amortized

CLASSES, LATENT, COLUMNS, ROWS = 3, 2, 5, 300
PRIOR = [0.5, 0.3, 0.2]


@pytest.fixture(scope="module")
def oracles():
    return [LinearGaussian(LATENT, COLUMNS, scale=1.0, seed=seed) for seed in range(CLASSES)]


@pytest.fixture(scope="module")
def drawn(oracles):
    """Rows of all classes and their labels."""
    x = torch.cat([oracle.sample(ROWS, seed=10 + c) for c, oracle in enumerate(oracles)])
    return x, torch.arange(CLASSES).repeat_interleave(ROWS)


def exact(oracles, x):
    return torch.stack([oracle.evidence(x) for oracle in oracles], 1)


def at_their_posteriors(oracles):
    """Under the exact posterior every draw's weight is the evidence."""
    return [(oracle.model, oracle.posterior) for oracle in oracles]


class Best(nn.Module):
    """An encoder to the best q_params of every row."""

    def __init__(self, oracle):
        super().__init__()
        self.best = oracle.best

    def forward(self, x):
        return self.best(x)


def amortized(oracles):
    return [(oracle.model, Amortized(Best(oracle), DiagonalNormal(LATENT))) for oracle in oracles]


def of(log_evidence, prior=(1.0, 1.0, 1.0), temperature=1.0):
    log_prior = torch.tensor(prior).double().log() - math.log(sum(prior))
    return Classification(log_evidence, torch.zeros_like(log_evidence), log_prior, temperature, 1)


def simulated(rows, sharpness=1.0, seed=0):
    """Log-evidence whose probabilities at temperature 1 are right, multiplied by a sharpness, and the labels."""
    random = torch.Generator().manual_seed(seed)
    log_p = 1.5 * torch.randn(rows, CLASSES, generator=random, dtype=torch.double)
    labels = torch.multinomial(log_p.softmax(1), 1, generator=random).squeeze(1)
    return sharpness * log_p, labels


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("prior", [None, PRIOR])
def test_under_exact_posteriors_probabilities_are_bayes_rule(oracles, drawn, prior, temperature):
    x, _ = drawn
    found = classify(at_their_posteriors(oracles), x, prior=prior, temperature=temperature, K=2)
    log_prior = torch.tensor(prior or [1.0] * CLASSES).double().log()
    bayes = (log_prior + exact(oracles, x) / temperature).log_softmax(1)
    assert (found.log_evidence - exact(oracles, x)).abs().max() < 1e-3  # float32
    assert torch.allclose(found.log_probabilities, bayes, atol=2e-3)
    assert torch.allclose(found.log_probabilities.exp().sum(1), torch.ones(len(x)).double())


def test_other_proposals_give_the_evidence_within_its_error(oracles, drawn):
    x, _ = drawn
    found = classify(amortized(oracles), x, K=500)
    apart, se = found.log_evidence - exact(oracles, x), found.log_evidence_se
    bias, mean_error = -(se**2).mean(0) / 2, (se**2).sum(0).sqrt() / len(x)
    assert ((apart.mean(0) - bias).abs() < 4 * mean_error).all(), (apart.mean(0), bias, mean_error)
    assert (mean_error < 0.01).all()
    one = classify(amortized(oracles), x, K=1)
    lost = exact(oracles, x) - one.log_evidence  # a single draw gives the ELBO
    gaps = torch.stack([oracle.gap for oracle in oracles])
    assert ((lost.mean(0) - gaps).abs() < 4 * lost.std(0) / len(x) ** 0.5).all()
    assert lost.mean() > 3 * lost.std() / lost.numel() ** 0.5
    assert one.log_evidence_se.isnan().all()


def test_a_class_model_in_the_place_of_another_costs_its_rows(oracles, drawn):
    x, y = drawn
    pairs = at_their_posteriors(oracles)
    right, swapped = (classify(order, x, K=2).summary(y)["accuracy"] for order in (pairs, pairs[1::-1] + pairs[2:]))
    share = (exact(oracles, x).argmax(1) == y).double().mean()
    assert right.mean == pytest.approx(share.item(), abs=0.01)
    assert right.mean > 0.6
    assert swapped.mean < right.mean - 10 * right.se


class Moved(nn.Module):
    """One linear Gaussian for all classes, moved by the label at the end of each row; its posterior is exact."""

    uses_labels = True

    def __init__(self):
        super().__init__()
        self.oracle, self.moves = LinearGaussian(LATENT, COLUMNS), torch.eye(CLASSES, COLUMNS) * 2

    def own(self, x):
        values, label = x.split([COLUMNS, CLASSES], 1)
        return values - label @ self.moves

    def model(self, x, index=None):
        self.oracle.model(self.own(x), index)

    def guide(self, x, index=None):
        self.oracle.posterior(self.own(x), index)


def test_a_program_that_is_given_the_label_is_asked_under_every_label():
    program = Moved()
    x, y = program.oracle.sample(ROWS), torch.arange(ROWS) % CLASSES
    x = x + program.moves[y]
    found = classify_conditional(program.model, program.guide, x.numpy(), CLASSES, prior=PRIOR, K=2)
    bayes = torch.stack([program.oracle.evidence(x - move) for move in program.moves], 1)
    assert (found.log_evidence - bayes).abs().max() < 1e-3
    assert torch.equal(found.predicted, (bayes + torch.tensor(PRIOR).log()).argmax(1))
    assert found.summary(y)["accuracy"].mean > 0.7


def test_rows_are_counted_and_draws_are_fixed_by_the_seed(oracles, drawn):
    x, done = drawn[0][:20], []
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = classify(amortized(oracles), x, K=4, seed=1, progress=done.append).log_evidence
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(done) == CLASSES * len(x)
    assert torch.equal(first, classify(amortized(oracles), x, K=4, seed=1).log_evidence)
    assert not torch.equal(first, classify(amortized(oracles), x, K=4, seed=2).log_evidence)


def test_temperature_changes_how_sure_and_between_alike_classes_not_which():
    log_evidence, _ = simulated(200)
    found = of(log_evidence, PRIOR)
    assert torch.allclose(found.at(1e6).log_probabilities.exp(), torch.tensor(PRIOR).double(), atol=1e-4)
    assert torch.equal(of(log_evidence).at(5).predicted, log_evidence.argmax(1))
    assert torch.equal(found.at(2).at(1).log_probabilities, found.log_probabilities)
    assert found.at(0.01).log_probabilities.max(1).values.mean() > -0.05


@pytest.mark.parametrize("sharpness", [1.0, 3.0, 0.5])
def test_the_temperature_that_made_evidence_too_sure_is_found(sharpness):
    log_evidence, labels = simulated(4000, sharpness)
    found = fit_temperature(log_evidence, labels)
    assert abs(found.mean - sharpness) < 4 * found.se
    assert found.se < 0.05 * sharpness


def test_the_error_of_the_temperature_is_its_spread():
    found = [fit_temperature(*simulated(300, 3.0, seed)) for seed in range(100)]
    spread = np.std([each.mean for each in found])
    assert np.mean([each.se for each in found]) == pytest.approx(spread, rel=0.3)  # 4 of the 0.07 of 100 repeats


def test_no_other_temperature_has_a_smaller_loss():
    log_evidence, labels = simulated(500, 3.0)
    best = fit_temperature(log_evidence, labels, PRIOR).mean
    losses = [of(log_evidence, PRIOR, best * by).summary(labels)["log_loss"].mean for by in (0.25, 0.98, 1, 1.02, 4)]
    assert losses[2] == min(losses)
    assert losses[0] > losses[1]
    assert losses[4] > losses[3]


def test_figures_are_those_of_others():
    log_evidence, labels = simulated(500, 2.0)
    found = of(log_evidence)
    p = found.log_probabilities.exp().numpy()
    figures = found.summary(labels)
    assert figures["log_loss"].mean == pytest.approx(log_loss(labels, p))
    assert figures["brier"].mean == pytest.approx(((p - np.eye(CLASSES)[labels]) ** 2).sum(1).mean())
    assert (found.confusion(labels).numpy() == confusion_matrix(labels, found.predicted)).all()
    assert figures["accuracy"].mean == found.confusion(labels).diag().sum() / 500
    assert figures["accuracy"].se == pytest.approx(
        (figures["accuracy"].mean * (1 - figures["accuracy"].mean) / 499) ** 0.5
    )


def test_confusion_counts_classes_that_nobody_predicts():
    found = of(torch.tensor([[2.0, 1.0, 0.0]] * 4))
    assert found.confusion([0, 1, 1, 2]).tolist() == [[1, 0, 0], [2, 0, 0], [1, 0, 0]]


def test_calibration_error_is_what_chance_makes_where_probabilities_are_right():
    log_evidence, labels = simulated(3000)
    right, sure = of(log_evidence).summary(labels), of(3 * log_evidence).summary(labels)
    chance = right["calibration_error_by_chance"]
    assert abs(right["calibration_error"].mean - chance.mean) < 5 * chance.se
    assert sure["calibration_error"].mean > sure["calibration_error_by_chance"].mean + 5 * sure["calibration_error"].se
    mended = of(3 * log_evidence).at(fit_temperature(3 * log_evidence, labels).mean).summary(labels)
    assert abs(mended["calibration_error"].mean - chance.mean) < 5 * chance.se


def test_calibration_error_of_one_confidence_is_its_distance_from_the_accuracy():
    log_evidence = torch.tensor([[math.log(9.0), 0.0]]).double().repeat(1500, 1)
    labels = (torch.arange(1500) % 5 > 2).long()  # right in three of five, sure at nine of ten
    found = Classification(log_evidence, log_evidence, torch.zeros(2).double(), 1.0, 1).summary(labels)
    assert found["calibration_error"].mean == pytest.approx(0.3)
    assert found["calibration_error"].se == pytest.approx((0.24 / 1500) ** 0.5, rel=0.02)


def test_ties_go_to_one_class_and_count_as_unsure():
    found = of(torch.zeros(6, CLASSES))
    assert found.predicted.tolist() == [0] * 6
    assert found.summary([0, 0, 1, 1, 2, 2])["log_loss"].mean == pytest.approx(math.log(CLASSES))


def test_evidence_that_is_always_right_is_doubted_by_a_row():
    apart = 7 * torch.eye(2).repeat(50, 1)
    found = fit_temperature(apart, [0, 1] * 50)
    # The doubt of 1 / 102 is what every row's probability of the other class becomes.
    assert found.mean == pytest.approx(7 / math.log(101))
    assert math.isnan(found.se)


def test_evidence_that_tells_less_than_the_prior_has_no_temperature():
    with pytest.raises(UserError, match=r"less about the classes of these 3 rows than the prior.*; fit the programs"):
        fit_temperature(-torch.eye(CLASSES), [0, 1, 2])


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1], r"labels have shape \(2,\), but there are 3 rows"),
        ([0, 1, 3], "label 3 is no class; give numbers from 0 to 2"),
        ([0, -1, 2], "label -1 is no class"),
        ([0, 0.5, 2], r"label 0.5 is no class"),
    ],
)
def test_labels_that_do_not_fit_are_mistakes_of_the_user(labels, said):
    found = of(torch.eye(CLASSES))
    for judge in (found.summary, found.confusion, lambda y: fit_temperature(found.log_evidence, y)):
        with pytest.raises(UserError, match=said):
            judge(labels)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prior": [0.5, 0.5]}, r"the prior has shape \(2,\), but there are 3 classes"),
        ({"prior": [0.5, 0.5, 0.0]}, "every class needs a positive number"),
        ({"temperature": 0.0}, "temperature is 0.0, but it must be positive"),
        ({"K": 0}, "K is 0, but it must be positive"),
    ],
)
def test_wrong_options_are_mistakes_of_the_user(oracles, drawn, change, said):
    with pytest.raises(UserError, match=said):
        classify(at_their_posteriors(oracles), drawn[0], **change)


def test_one_class_or_point_masses_are_refused(oracles, drawn):
    with pytest.raises(UserError, match="1 class is given; at least 2 are needed"):
        classify(at_their_posteriors(oracles)[:1], drawn[0])
    modes = [(oracle.model, Amortized(nn.Linear(COLUMNS, LATENT), Delta(LATENT))) for oracle in oracles]
    with pytest.raises(Incompatible, match="no evidence to classify by"):
        classify(modes, drawn[0])
    with pytest.raises(UserError, match="temperature is -1"):
        of(torch.eye(CLASSES)).at(-1)
