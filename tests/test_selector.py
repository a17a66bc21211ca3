"""FociSelector: scikit-learn's own checks, and what it adds to foci."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas
import pytest
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import (
    check_n_features_in_after_fitting,
    check_set_output_transform,
    check_transformer_get_feature_names_out,
    estimator_checks_generator,
)

from fastunlearn.codec import foci
from fastunlearn.selection import FociSelector

ESTIMATORS = [
    FociSelector(),
    FociSelector(early_stop=False, noise=0.1, random_state=0),
    FociSelector(early_stop=False, max_features=1, standardize=False),
]
# Array API inputs: scikit-learn skips the check itself unless SCIPY_ARRAY_API is set.
SKIPPED = {"check_array_api_input"}
CHECKS = [
    pytest.param(estimator, check, id=f"{i}-{check.func.__name__}")
    for i, one in enumerate(ESTIMATORS)
    for estimator, check in estimator_checks_generator(one)
    if check.func.__name__ not in SKIPPED
]


def draw(n: int, p: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(n, p))


@pytest.mark.filterwarnings("ignore:No features were selected")  # some of the checks' responses are pure noise
@pytest.mark.parametrize("estimator,check", CHECKS)
def test_scikit_learn_check(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize(
    "check", [check_n_features_in_after_fitting, check_set_output_transform, check_transformer_get_feature_names_out]
)
def test_check_that_scikit_learn_runs_on_its_own_transformers_alone(check: Any) -> None:
    check("FociSelector", FociSelector())


def test_there_are_checks_and_none_is_expected_to_fail() -> None:
    assert len(CHECKS) > 40 * len(ESTIMATORS)


def test_choices_are_those_of_foci() -> None:
    x = draw(200, 6)
    y = x[:, 4] + x[:, 1] * x[:, 2]
    for early_stop in (True, False):
        plain = FociSelector(early_stop=early_stop, standardize=False).fit(x, y)
        found = foci(x, y, early_stop=early_stop)
        assert plain.indices_.tolist() == found.indices and plain.scores_.tolist() == found.scores
    scaled = FociSelector().fit(x, y)
    found = foci((x - x.mean(0)) / x.std(0), y)
    assert scaled.indices_.tolist() == found.indices and scaled.scores_.tolist() == found.scores
    noisy = FociSelector(noise=0.2, random_state=3, standardize=False).fit(x, y)
    assert noisy.indices_.tolist() == foci(x, y, noise=0.2, seed=3).indices


def test_support_is_in_order_of_columns_and_indices_in_order_of_choice() -> None:
    x = draw(400, 5)
    y = 3 * x[:, 3] + x[:, 1]
    selector = FociSelector(max_features=2).fit(x, y)
    assert selector.indices_.tolist() == [3, 1] and selector.scores_.shape == (2,)
    assert selector.indices_.dtype == np.int64 and selector.scores_.dtype == np.float64
    assert selector.get_support().tolist() == [False, True, False, True, False]
    assert selector.get_support(indices=True).tolist() == [1, 3]
    assert (selector.transform(x) == x[:, [1, 3]]).all()
    assert (selector.inverse_transform(selector.transform(x))[:, [1, 3]] == x[:, [1, 3]]).all()
    assert selector.get_feature_names_out().tolist() == ["x1", "x3"]
    assert selector.get_feature_names_out(list("abcde")).tolist() == ["b", "d"]


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e160])
def test_units_of_features_do_not_matter(scale: float) -> None:
    x = draw(400, 5)
    y = (x[:, 0] + 2 * x[:, 1]) * x[:, 1]
    wide = x * [1.0, scale, 1 / scale, 1.0, scale] + [0.0, scale, 0.0, 10.0, 0.0]
    one, same = FociSelector().fit(x, y), FociSelector().fit(wide, y)
    assert one.indices_.tolist() == same.indices_.tolist() and set(one.indices_) >= {0, 1}


def test_without_standardizing_a_large_unit_drowns_the_others() -> None:
    x = draw(400, 3)
    y = x[:, 0] + 2 * x[:, 1]
    x[:, 1] *= 1e6
    assert set(FociSelector().fit(x, y).indices_) == {0, 1}
    assert set(FociSelector(standardize=False).fit(x, y).indices_) != {0, 1}


def test_constant_columns_are_never_chosen() -> None:
    x = draw(100, 4)
    x[:, 0], x[:, 2] = 0.1, 0.0
    assert set(FociSelector(early_stop=False).fit(x, x[:, 1]).indices_) == {1, 3}


def test_labels_are_ranked_in_order_of_unique() -> None:
    x = draw(200, 4)
    y = (x[:, 2] > 0).astype(int) + (x[:, 2] > 1)
    names = np.array(["a", "b", "c"])[y]
    by_number = FociSelector().fit(x, y)
    for labels in (names, names.astype(object), names.tolist(), y.astype(float), 10 * y - 7, y.astype(np.uint8)):
        by_label = FociSelector().fit(x, labels)
        assert by_label.indices_.tolist() == by_number.indices_.tolist()
        assert (by_label.scores_ == by_number.scores_).all()
    assert FociSelector().fit(x, y > 0).indices_[0] == 2
    dates = np.datetime64("2020-01-01") + y.astype("timedelta64[D]")
    assert FociSelector().fit(x, dates).indices_.tolist() == by_number.indices_.tolist()


def test_any_order_of_labels_finds_what_they_depend_on_though_not_in_one_order() -> None:
    x = draw(500, 5)
    y = (x[:, 1] > 0).astype(int) + 2 * (x[:, 3] > 0)
    orders = [np.array(order)[y] for order in ([0, 1, 2, 3], [1, 0, 3, 2], [0, 2, 1, 3], [3, 0, 1, 2])]
    found = [FociSelector(max_features=2).fit(x, order).indices_.tolist() for order in orders]
    assert all(set(one) == {1, 3} for one in found) and len({tuple(one) for one in found}) == 2
    one_against_rest = [set(FociSelector().fit(x, y == label).indices_) for label in range(4)]
    assert set.union(*one_against_rest) == {1, 3}


def test_in_a_pipeline_with_labels_and_a_grid() -> None:
    data = load_wine()
    labels = data.target_names[data.target]
    pipeline = make_pipeline(StandardScaler(), FociSelector(), LogisticRegression())
    assert cross_val_score(pipeline, data.data, labels, cv=3).mean() > 0.9
    search = GridSearchCV(pipeline, {"fociselector__max_features": [1, 4]}, cv=3).fit(data.data, labels)
    assert search.best_params_ == {"fociselector__max_features": 4}
    assert search.best_estimator_[:-1].get_feature_names_out(data.feature_names).shape == (4,)


def test_fewer_features_help_nearest_neighbours() -> None:
    x = draw(400, 30)
    y = np.sin(2 * x[:, 5]) + x[:, 20] ** 2
    alone = cross_val_score(KNeighborsRegressor(), x, y, cv=3).mean()
    assert cross_val_score(make_pipeline(FociSelector(), KNeighborsRegressor()), x, y, cv=3).mean() > 0.8 > 2 * alone


def test_data_frames_keep_their_names() -> None:
    x = pandas.DataFrame(draw(200, 4), columns=list("abcd"))
    selector = FociSelector().set_output(transform="pandas")
    kept = selector.fit_transform(x, x["c"] + 0.1 * x["a"])
    assert selector.feature_names_in_.tolist() == list("abcd") and "c" in kept.columns
    assert set(kept.columns) == set(selector.get_feature_names_out())


def test_clone_and_pickle() -> None:
    x = draw(100, 3)
    selector = FociSelector(noise=0.1, random_state=1).fit(x, x[:, 0])
    assert clone(selector).get_params() == selector.get_params()
    assert (pickle.loads(pickle.dumps(selector)).transform(x) == selector.transform(x)).all()


def test_random_state_is_used_for_noise_alone() -> None:
    x = np.round(draw(150, 6))
    y = x[:, 0] + x[:, 3]
    scores = [FociSelector(noise=0.1, random_state=np.random.RandomState(s)).fit(x, y).scores_ for s in (0, 0, 1)]
    assert scores[0].tolist() == scores[1].tolist() != scores[2].tolist()
    state = np.random.RandomState(0)
    FociSelector(random_state=state).fit(x, y)
    assert state.randint(1000) == np.random.RandomState(0).randint(1000)


def test_float32_stays_float32() -> None:
    x = draw(100, 3).astype(np.float32)
    assert FociSelector().fit_transform(x, x[:, 1]).dtype == np.float32
    assert FociSelector().fit(x, x[:, 1]).indices_[0] == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("standardize", [True, False])
def test_views_and_read_only_arrays(standardize: bool) -> None:
    x = draw(100, 4)
    one = FociSelector(standardize=standardize).fit(x[::-1, ::-1], x[::-1, 1])
    x.flags.writeable = False
    same = FociSelector(standardize=standardize).fit(x, x[:, 1])
    assert one.indices_[0] == 2 and same.indices_[0] == 1


def test_data_is_left_as_it_is() -> None:
    x = draw(50, 3)
    before = x.copy()
    FociSelector().fit(x, x[:, 1])
    assert (x == before).all()


def test_nothing_chosen_is_said() -> None:
    selector = FociSelector().fit(draw(50, 3), np.ones(50))
    assert len(selector.indices_) == len(selector.scores_) == 0
    with pytest.warns(UserWarning, match="No features were selected"):
        assert selector.transform(draw(50, 3)).shape == (50, 0)


def test_bad_input_is_refused() -> None:
    x = draw(20, 3)
    with pytest.raises(TypeError, match="Sparse data was passed"):
        FociSelector().fit(sparse.csr_array(x), x[:, 0])
    with pytest.raises(ValueError, match="requires y to be passed"):
        FociSelector().fit(x, None)
    with pytest.raises(ValueError, match="minimum of 2 is required"):
        FociSelector().fit(x[:1], [1.0])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        FociSelector().fit(x, x[:-1, 0])
    with pytest.raises(ValueError, match="contains NaN"):
        FociSelector().fit(np.where(x == x[3, 1], np.nan, x), x[:, 0])
    with pytest.raises(ValueError, match="y contains NaN"):
        FociSelector().fit(x, np.where(x[:, 0] == x[3, 0], np.nan, x[:, 0]))
    with pytest.raises(TypeError, match="uniformly strings or numbers"):
        FociSelector().fit(x, np.array(["a", 1] * 10, dtype=object))
    with pytest.raises(ValueError, match="noise must be"):
        FociSelector(noise=-1.0).fit(x, x[:, 0])
    with pytest.raises(ValueError, match="max_features must be"):
        FociSelector(max_features=-1).fit(x, x[:, 0])
    with pytest.raises(ValueError, match="not fitted yet"):
        FociSelector().transform(x)
