"""FOCI as a scikit-learn feature selector."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.feature_selection import SelectorMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from fastunlearn.codec import foci


class FociSelector(SelectorMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no type hints
    """Keep the features that :func:`fastunlearn.foci` chooses: those that Y depends on, given the ones before.

    A model-free filter with its own stop: it sees non-linear dependence and interactions, needs no estimator and no
    number of features. Follows scikit-learn's interface (``fit``, ``transform``, ``get_support``,
    ``get_feature_names_out``, ``set_output``), so it stands in a ``Pipeline`` or a grid search.

    Y is used through its ranks alone. Numbers are ranked as they are; labels in the order of ``np.unique``. For two
    classes the order does not matter but for the estimate's own scatter. For more classes any order tells whether Y
    depends on a feature (T = 0 for independence and T = 1 for a function of it whatever the order), but it weighs
    the classes: T is an average over the splits "label >= t". Where classes have no order and the ranking of
    features matters, fit one selector per class on ``y == c`` and take the union.

    Args:
        early_stop: stop when no feature adds to what the chosen ones tell (T <= 0).
        noise: standard deviation of Gaussian noise added to each feature before distances are taken, as a share of
            the feature's own standard deviation; breaks the ties of discrete features at random.
        max_features: how many to choose at most; all by default.
        random_state: of that noise: an int is the ``seed`` of :func:`~fastunlearn.foci`, a ``RandomState`` or None
            (NumPy's global one) draws one. Unused, and nothing drawn, where ``noise`` is 0.
        standardize: divide each feature by its standard deviation first. On by default, as in the authors' R package
            FOCI: from the second feature on, neighbours are found by Euclidean distance, so a feature in
            millimetres would drown one in metres. Off leaves distances as they are. The first choice is the same
            either way, rounding aside.

    Attributes:
        indices_: int64 [k], chosen columns in the order chosen. ``transform`` keeps them in the order of X.
        scores_: float64 [k], T(Y, feature | chosen before) of each of ``indices_``.
        n_features_in_: columns of X.
        feature_names_in_: their names, where X was a DataFrame with string names.

    Cost, memory and source: those of :func:`fastunlearn.foci` (Azadkia & Chatterjee, Annals of Statistics 2021),
    on the CPU. float32 X keeps its distances in float32, all else is widened to float64.
    """

    indices_: NDArray[np.int64]
    scores_: NDArray[np.float64]
    n_features_in_: int

    def __init__(
        self,
        early_stop: bool = True,
        noise: float = 0.0,
        max_features: int | None = None,
        random_state: Any = None,
        standardize: bool = True,
    ) -> None:
        self.early_stop = early_stop
        self.noise = noise
        self.max_features = max_features
        self.random_state = random_state
        self.standardize = standardize

    def fit(self, X: Any, y: Any) -> FociSelector:
        """Choose features.

        Args:
            X: [n, p] real numbers; array or DataFrame, dense.
            y: [n], numbers or labels.

        Returns:
            self.

        Raises:
            ValueError: fewer than 2 rows, different numbers of rows, NaN or Inf, y missing, ``noise`` or
                ``max_features`` out of range.
            TypeError: sparse X; y of mixed types.
        """
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32), ensure_min_samples=2)
        seed = 0
        if self.noise:
            state = self.random_state
            seed = int(state) if isinstance(state, Integral) else check_random_state(state).randint(2**31 - 1)
        found = foci(
            # torch takes no views with negative strides and warns of read-only ones.
            _standardized(X) if self.standardize else np.require(X, requirements=["C", "W"]),
            LabelEncoder().fit_transform(y),  # equal values stay equal and order stays order: all that ranks use
            early_stop=self.early_stop,
            noise=self.noise,
            seed=seed,
            max_features=self.max_features,
        )
        self.indices_ = np.array(found.indices, dtype=np.int64)
        self.scores_ = np.array(found.scores, dtype=np.float64)
        return self

    def _get_support_mask(self) -> NDArray[np.bool_]:
        check_is_fitted(self)
        mask = np.zeros(self.n_features_in_, dtype=bool)
        mask[self.indices_] = True
        return mask

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


def _standardized(x: NDArray[Any]) -> NDArray[Any]:
    """x [n, p] with mean 0 and standard deviation 1 in every column, in its own dtype; constants become 0."""
    largest = np.abs(x).max(0).astype(np.float64)
    # First to at most 1, so that no square overflows or vanishes, and a constant is exactly 1 and has spread 0.
    scaled = x / np.where(largest > 0, largest, 1.0)
    scaled -= scaled.mean(0)
    spread = scaled.std(0)
    scaled /= np.where(spread > 0, spread, 1.0)
    standardized: NDArray[Any] = scaled.astype(x.dtype, copy=False)
    return standardized
