"""Choose the number of latents by held-out evidence, then classify by codes: a VAE in scikit-learn's own tools.

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

# The score is the rows' mean log evidence, so that scikit-learn's search takes the density that fits new rows best.
vae = pvae.VAE(likelihood="Bernoulli", max_iter=epochs, learning_rate=2e-3, random_state=0)
search = GridSearchCV(make_pipeline(Binarizer(threshold=8), vae), {"vae__n_components": [2, 4, 8]}, cv=3)
search.fit(train)
found = search.cv_results_
for chosen, score in zip(found["param_vae__n_components"], found["mean_test_score"], strict=True):
    print(f"{chosen} latents: {score:.2f} nats per row held out")
best = search.best_estimator_
print(f"test rows, {best[-1].n_components} latents: {best.score(test):.2f} nats per row")

# Labels for 100 rows only: codes learned from all rows, without labels, against principal components of as many.
for name, encoder in {"VAE": best, "PCA": make_pipeline(Binarizer(threshold=8), PCA(best[-1].n_components))}.items():
    codes = encoder.fit(train).transform(train[:100])
    classify = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(codes, y_train[:100])
    right = classify.score(encoder.transform(test), y_test)
    print(f"{name}: {right:.1%} of the test rows classified right by 100 labels")

# New rows, and how likely the likeliest and the unlikeliest test row are.
drawn = best[-1].sample(5)
scores = best.score_samples(test)
print(f"{len(drawn)} new rows of {drawn.shape[1]} pixels; test rows from {scores.min():.1f} to {scores.max():.1f} nats")
