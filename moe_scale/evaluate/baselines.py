"""What a model that knows no order of words or positions scores: a logistic regression by scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_scale.data.examples.prepare import PreparedExamples
from moe_scale.evaluate.classification import macro_f1

TFIDF = "TF-IDF + logistic regression"
MEAN_FEATURES = "logistic regression of the features' mean"


def logistic_regression(examples: PreparedExamples, num_classes: int) -> dict[str, Any]:
    """Fit a logistic regression to the training split, with scikit-learn's own settings, and score the test split.

    Of text the features are TF-IDF weights of its words, of sequences of features their mean.

    Returns:
        its name, accuracy and macro F1.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    train, test = examples.split("train"), examples.split("test")
    if examples.vocabulary is not None:
        name, weigh = TFIDF, TfidfVectorizer()
        if not any(map(weigh.build_analyzer(), train.texts())):  # words of two letters at least are what it takes
            weigh = TfidfVectorizer(token_pattern=r"\S+")
        features, of_test = weigh.fit_transform(train.texts()), weigh.transform(test.texts())
    else:
        name, features, of_test = MEAN_FEATURES, train.mean_features(), test.mean_features()
    fitted = LogisticRegression(max_iter=1000).fit(features, train.labels_M)
    predicted_N = fitted.predict(of_test)
    return {
        "name": name,
        "accuracy": float(np.mean(predicted_N == test.labels_M)),
        "f1": macro_f1(test.labels_M, predicted_N, num_classes),
    }
