"""What stands beside an opened run's uses: principal components, nearest neighbours and columns' means of its rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pvae.experiments.opened_run import SPLIT_LABELS, Run, SelectedRows
from pvae.stats import Estimate, mean_se, percent

# Rows to which they are fitted at most.
FITTED = 10_000


def through_components(run: Run, x: Tensor) -> Tensor:
    """Rows through as many principal components of the training rows as there are latent dimensions; else NaN."""
    from sklearn.decomposition import PCA

    known = run.data.fixed_train(FITTED).x[:, : run.columns]
    if known.isnan().any() or x.isnan().any():
        return torch.full_like(x, torch.nan)
    fitted = PCA(min(run.guide.sites.dim, *known.shape), random_state=0).fit(known.numpy())
    return torch.from_numpy(fitted.inverse_transform(fitted.transform(x.numpy()))).to(x)


def components_words(run: Run) -> str:
    """What the components are of, where that is not all training rows."""
    return f" of {FITTED:,} training rows" if len(run.data.train) > FITTED else ""


def column_means(run: Run) -> Tensor:
    """Means of the training rows' columns, a label's among them."""
    return run.data.fixed_train(FITTED).x.nanmean(0)


def preserved(run: Run, rows: SelectedRows, x: Tensor, row: Tensor) -> str:
    """In a sentence, how many new rows keep their row's class, as a classifier that has seen other rows judges it.

    Arguments:
        rows: the given rows, with labels.
        x, row: new rows, and which of the given ones each was made around; as many for each.

    Returns:
        Nothing where no other rows with labels are known.
    """
    from sklearn.neighbors import KNeighborsClassifier

    part = "test" if rows.index is not None else "train"
    kinds = getattr(run.data, f"{part}_labels")
    if kinds is None or rows.labels is None:
        return ""
    known = (run.data.test if part == "test" else run.data.fixed_train(FITTED).x)[:FITTED]
    judge = KNeighborsClassifier(5).fit(_plain(run, known), kinds[: len(known)].numpy())
    kept, own = (
        torch.from_numpy(judge.predict(_plain(run, each)) == kind.numpy()).double()
        for each, kind in ((x, rows.labels[row]), (rows.x, rows.labels))
    )
    around: Estimate = mean_se(kept.view(len(own), -1).mean(1))
    return (
        f"Class kept by {percent(around)} of the new rows, as the five nearest of {len(known):,} {SPLIT_LABELS[part]} "
        f"see it; they see {percent(mean_se(own))} of the given rows right."
    )


def _plain(run: Run, rows: Tensor) -> np.ndarray:
    """Rows as a classifier takes them: without labels, 0 for what is missing."""
    return rows[:, : run.columns].nan_to_num(0.0).numpy()
