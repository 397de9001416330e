"""What a user would pick instead of a VAE, on the same rows and with as many dimensions: scikit-learn's."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM
from torch import Tensor

# Rows that methods are fitted to whose cost grows with the square of them.
FEW = 5000


def through_pca(train: Tensor, x: Tensor, dim: int) -> Tensor:
    """Rows through principal components."""
    fitted = PCA(dim, random_state=0).fit(train.numpy())
    return torch.from_numpy(fitted.inverse_transform(fitted.transform(x.numpy()))).float()


def pca_imputed(train: Tensor, x: Tensor, there: Tensor, dim: int, rounds: int = 50) -> Tensor:
    """Missing entries by principal components: fill, project, and again, as expectation maximization would."""
    fitted = PCA(dim, random_state=0).fit(train.numpy())
    filled = torch.where(there, x, train.mean(0))
    for _ in range(rounds):
        back = torch.from_numpy(fitted.inverse_transform(fitted.transform(filled.numpy()))).float()
        filled = torch.where(there, x, back)
    return filled


def knn_imputed(train: Tensor, x: Tensor, there: Tensor) -> Tensor:
    """Missing entries by the five nearest of ``FEW`` training rows."""
    hidden = torch.where(there, x, torch.nan)
    return torch.from_numpy(KNNImputer(n_neighbors=5).fit(train[:FEW].numpy()).transform(hidden.numpy())).float()


def iteratively_imputed(train: Tensor, x: Tensor, there: Tensor) -> Tensor:
    """Missing entries by Bayesian ridge regressions of each column on the others."""
    # Columns without any variance have no regression and are filled with their mean.
    hidden = torch.where(there, x, torch.nan)
    imputer = IterativeImputer(random_state=0, max_iter=10, keep_empty_features=True).fit(train.numpy())
    return torch.from_numpy(imputer.transform(hidden.numpy())).float()


def anomaly_scores(train: Tensor, x: Tensor, dim: int) -> dict[str, Tensor]:
    """Scores by name, higher for what is more anomalous."""
    few, rows = train[:FEW].numpy(), x.numpy()
    forest = IsolationForest(n_estimators=200, random_state=0).fit(train.numpy())
    machine = make_pipeline(StandardScaler(with_std=False), OneClassSVM(gamma="scale", nu=0.1)).fit(few)
    return {
        f"PCA error, {dim} dimensions": (through_pca(train, x, dim) - x).square().sum(1),
        "IsolationForest, 200 trees": torch.from_numpy(-forest.score_samples(rows)),
        f"OneClassSVM, at most {FEW:,} rows": torch.from_numpy(-machine.score_samples(rows)),
    }


def classifiers() -> dict[str, object]:
    """Classifiers by name."""
    return {
        "LogisticRegression": make_pipeline(StandardScaler(with_std=False), LogisticRegression(max_iter=300)),
        "5 nearest neighbours": KNeighborsClassifier(5),
    }


def right(classifier: object, train: Tensor, labels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Which rows a classifier gets right, [B], fitted to training rows."""
    classifier.fit(train.numpy(), labels.numpy())  # type: ignore[attr-defined]
    return torch.from_numpy(np.asarray(classifier.predict(x.numpy()) == y.numpy())).double()  # type: ignore[attr-defined]
