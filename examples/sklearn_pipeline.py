"""Use a VAE in scikit-learn: choose the latent dimension by held-out evidence, then classify codes.

python examples/sklearn_pipeline.py [epochs]
"""

import sys

from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Binarizer, StandardScaler

import pvae

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 100
x, y = load_digits(return_X_y=True)
train, test, y_train, y_test = train_test_split(x, y, test_size=0.3, random_state=0)

# The score is the mean log evidence of rows, so that the search takes the dimension with the best held-out density.
vae = pvae.sklearn.VAE(likelihood="Bernoulli", max_iter=epochs, learning_rate=2e-3, random_state=0)
search = GridSearchCV(make_pipeline(Binarizer(threshold=8), vae), {"vae__n_components": [2, 4, 8]}, cv=3)
search.fit(train)
results = search.cv_results_
for dimension, score in zip(results["param_vae__n_components"], results["mean_test_score"], strict=True):
    print(f"{dimension} latents: held-out evidence {score:.2f} nats per row")
best = search.best_estimator_
print(f"test rows, {best[-1].n_components} latents: {best.score(test):.2f} nats per row")

# Labels for 100 rows only: codes, learned from all rows without labels, against PCA of the same dimension.
for name, encoder in {"VAE": best, "PCA": make_pipeline(Binarizer(threshold=8), PCA(best[-1].n_components))}.items():
    codes = encoder.fit(train).transform(train[:100])
    classify = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(codes, y_train[:100])
    accuracy = classify.score(encoder.transform(test), y_test)
    print(f"{name}: accuracy {accuracy:.1%} on test rows from 100 labels")

samples = best[-1].sample(5)
scores = best.score_samples(test)
print(f"{len(samples)} new rows of {samples.shape[1]} pixels; evidence of test rows", end=" ")
print(f"from {scores.min():.1f} to {scores.max():.1f} nats")
