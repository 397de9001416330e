"""Baselines of the uses of a run, from its training rows: PCA, 5-nearest-neighbour labels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pvae.cli.use_context import error_words, squared_error
from pvae.experiments.row_selection import SPLIT_LABELS, SelectedRows
from pvae.experiments.run import Run
from pvae.runtime.torch_state import to_numpy
from pvae.stats import mean_se, percent

FITTED = 10_000  # rows that baselines are fitted to, at most


def pca_reconstruction(run: Run, x: Tensor) -> tuple[Tensor, str]:
    """Reconstruct rows from as many principal components as latent dimensions (NaN if entries are missing); say how."""
    from sklearn.decomposition import PCA

    train, x_hat = run.data.fixed_train(FITTED).x[:, : run.columns], torch.full_like(x, torch.nan)
    if not train.isnan().any() and not x.isnan().any():
        pca = PCA(min(run.guide.sites.dim, *train.shape), random_state=0).fit(to_numpy(train))
        x_hat = torch.from_numpy(pca.inverse_transform(pca.transform(to_numpy(x)))).to(x)
    some = f" of {FITTED:,} training rows" if len(run.data.train) > FITTED else ""
    return x_hat, f"as many principal components{some} leave {error_words(squared_error(x_hat, x))}"


def preserved_labels(run: Run, rows: SelectedRows, x: Tensor, row: Tensor) -> str:
    """Say how many new rows x keep their row's label by a classifier of other rows; "" if none with labels exist."""
    from sklearn.neighbors import KNeighborsClassifier

    part = "test" if rows.index is not None else "train"
    labels = getattr(run.data, f"{part}_labels")
    if labels is None or rows.labels is None:
        return ""
    known = (run.data.test if part == "test" else run.data.fixed_train(FITTED).x)[:FITTED]
    classifier = KNeighborsClassifier(5).fit(_features(run, known), to_numpy(labels[: len(known)]))
    new, given = (
        torch.from_numpy(classifier.predict(_features(run, values)) == to_numpy(truth)).double()
        for values, truth in ((x, rows.labels[row]), (rows.x, rows.labels))
    )
    preserved = mean_se(new.view(len(given), -1).mean(1))  # new rows around one row are not independent
    rule = f"the majority of the five nearest of {len(known):,} {SPLIT_LABELS[part]}"
    right = f"{percent(mean_se(given))} of the given rows"
    return f"{percent(preserved)} of the new rows keep their label by {rule}, which is right for {right}."


def _features(run: Run, rows: Tensor) -> np.ndarray:
    """Return rows without labels, with 0 for missing entries."""
    return to_numpy(rows[:, : run.columns].nan_to_num(0.0))
