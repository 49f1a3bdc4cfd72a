"""scikit-learn's own tools on MILClassifier, and that the core does without scikit-learn."""

import pickle
import textwrap
from typing import Any

import numpy as np
import pytest
import sklearn
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError, UnsetMetadataPassedError
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    StratifiedGroupKFold,
    cross_val_predict,
    cross_val_score,
    cross_validate,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.validation import check_is_fitted
from support.mil_cohort import planted_cohort
from support.programs import run_program
from torch import nn

from xmag.errors import InputError, XmagWarning
from xmag.evaluate import LinearProbe
from xmag.mil import MILClassifier, aggregator

COHORT = planted_cohort(24, tiles=6, dim=4)
NO_GROUPS = "ignore:no groups were given"


def tiny(**params: object) -> MILClassifier:
    defaults = {
        "aggregator_options": {"embed_dim": 4, "attention_dim": 2}, "epochs": 2,
        "random_state": 0, "device": "cpu",
    }  # fmt: skip
    return MILClassifier(**{**defaults, **params})  # type: ignore[arg-type]


def test_a_clone_has_the_parameters_and_nothing_that_was_fitted() -> None:
    fitted = tiny(class_weight={"positive": 2.0}).fit(COHORT.bags, COHORT.labels, validation=None)
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    assert not hasattr(copy, "classes_")
    module = aggregator("mean", in_dim=4, classes=2)
    assert isinstance(clone(tiny(aggregator=module, aggregator_options=None)).aggregator, nn.Module)


def test_the_constructor_stores_what_it_is_given() -> None:
    options = {"embed_dim": 4}
    classifier = MILClassifier(aggregator_options=options, epochs="many")  # type: ignore[arg-type]
    assert classifier.aggregator_options is options
    assert classifier.get_params()["epochs"] == "many"
    assert classifier.set_params(epochs=3, lr=0.5) is classifier
    assert (classifier.epochs, classifier.lr) == (3, 0.5)
    with pytest.raises(InputError, match=r"no parameter 'epoch'; expected one of .*'epochs'"):
        classifier.set_params(epoch=3)
    with pytest.raises(TypeError):
        MILClassifier("abmil")  # type: ignore[misc]


def test_the_representation_shows_what_is_not_default() -> None:
    assert repr(MILClassifier()) == "MILClassifier()"
    shown = repr(MILClassifier(aggregator="mean", epochs=5, class_weight={"a": 2.0}))
    assert shown == "MILClassifier(aggregator='mean', epochs=5, class_weight={'a': 2.0})"


def test_scikit_learn_sees_a_classifier() -> None:
    assert is_classifier(tiny())
    with pytest.raises(sklearn.exceptions.NotFittedError):
        check_is_fitted(tiny())
    check_is_fitted(tiny().fit(COHORT.bags, COHORT.labels, validation=None))


@pytest.mark.filterwarnings(NO_GROUPS)
def test_cross_validation_scores_as_by_hand() -> None:
    folds = StratifiedGroupKFold(3)
    split = list(folds.split(COHORT.bags, COHORT.labels, COHORT.patients))
    expected = []
    for train, test in split:
        part, other = COHORT.subset(train), COHORT.subset(test)
        fold = tiny().fit(part.bags, part.labels)
        truth = np.array(other.labels) == "positive"
        expected.append(roc_auc_score(truth, fold.predict_proba(other.bags)[:, 1]))
    found = cross_val_score(
        tiny(), COHORT.bags, COHORT.labels, groups=COHORT.patients, cv=folds, scoring="roc_auc"
    )
    np.testing.assert_allclose(found, expected)
    assert cross_val_score(tiny(), COHORT.bags, COHORT.labels, cv=2).shape == (2,)
    probabilities = cross_val_predict(
        tiny(), COHORT.bags, COHORT.labels, cv=3, method="predict_proba"
    )
    assert probabilities.shape == (24, 2)


def test_fit_parameters_reach_fit_without_routing() -> None:
    cross_val_score(
        tiny(), COHORT.bags, COHORT.labels, cv=2, params={"groups": COHORT.patients},
        error_score="raise",
    )  # fmt: skip


def test_a_grid_search_finds_the_setting_that_learns() -> None:
    """A mean sees nothing of tiles whose shifts cancel; their largest values do."""
    search = GridSearchCV(
        tiny(epochs=30, lr=0.01, aggregator_options={"embed_dim": 16}),
        {"aggregator": ["mean", "max"], "lr": [1e-8, 0.01]},
        scoring="roc_auc",
        cv=GroupKFold(2),
        error_score="raise",
    )
    cohort = planted_cohort(40, tiles=20, dim=4, site=0.0)
    search.fit(cohort.bags, cohort.labels, groups=cohort.patients, validation=None)
    assert search.best_params_["lr"] == 0.01
    assert search.best_score_ > 0.9
    assert search.best_estimator_.predict(cohort.bags).shape == (40,)


def test_a_pipeline_ends_in_a_classifier() -> None:
    pipeline = make_pipeline(FunctionTransformer(lambda bags: [2 * x for x in bags]), tiny())
    pipeline.fit(COHORT.bags, COHORT.labels, milclassifier__groups=COHORT.patients)
    expected = tiny().fit([2 * x for x in COHORT.bags], COHORT.labels, groups=COHORT.patients)
    np.testing.assert_array_equal(
        pipeline.predict_proba(COHORT.bags),
        expected.predict_proba([2 * x for x in COHORT.bags]),
    )


def test_metadata_routing_carries_groups_to_fit_and_to_the_splitter() -> None:
    """Without them fit would warn, and warnings are errors."""
    with pytest.raises(RuntimeError, match="routing is off"):
        tiny().set_fit_request(groups=True)
    with sklearn.config_context(enable_metadata_routing=True):
        asks = tiny().set_fit_request(groups=True)
        assert clone(asks).get_metadata_routing().fit.requests == {
            "groups": True, "validation": None,
        }  # fmt: skip
        options = {"params": {"groups": COHORT.patients}, "cv": GroupKFold(3)}
        scores = cross_validate(asks, COHORT.bags, COHORT.labels, error_score="raise", **options)
        assert scores["test_score"].shape == (3,)
        search = GridSearchCV(asks, {"lr": [1e-3]}, cv=GroupKFold(2), error_score="raise")
        search.fit(COHORT.bags, COHORT.labels, groups=COHORT.patients)
        with pytest.raises(UnsetMetadataPassedError):
            cross_validate(tiny(), COHORT.bags, COHORT.labels, **options)
        with pytest.warns(UserWarning, match="no groups were given"):
            cross_validate(
                tiny().set_fit_request(groups=False), COHORT.bags, COHORT.labels, **options
            )


def test_a_pipeline_with_routing_scores_without_scoring() -> None:
    with sklearn.config_context(enable_metadata_routing=True):
        pipeline = make_pipeline(
            FunctionTransformer(lambda bags: [2 * x for x in bags]),
            tiny().set_fit_request(groups=True),
        )
        options = {"params": {"groups": COHORT.patients}, "cv": GroupKFold(3)}
        args = pipeline, COHORT.bags, COHORT.labels
        found = cross_val_score(*args, error_score="raise", **options)
        expected = cross_val_score(*args, scoring="accuracy", **options)
        np.testing.assert_array_equal(found, expected)


def test_weights_of_a_score_are_those_of_scikit_learn() -> None:
    fitted = tiny().fit(COHORT.bags, COHORT.labels, validation=None)
    weights = np.arange(24) + 0.5
    expected = accuracy_score(COHORT.labels, fitted.predict(COHORT.bags), sample_weight=weights)
    found = fitted.score(COHORT.bags, COHORT.labels, sample_weight=weights)
    assert found == pytest.approx(expected)
    with sklearn.config_context(enable_metadata_routing=True):
        asks = tiny().set_fit_request(groups=True).set_score_request(sample_weight=True)
        scores = cross_val_score(
            asks, COHORT.bags, COHORT.labels, cv=GroupKFold(3), error_score="raise",
            params={"groups": COHORT.patients, "sample_weight": weights},
        )  # fmt: skip
    assert scores.shape == (3,)


def test_log_probabilities_are_the_logarithms_of_probabilities() -> None:
    fitted = tiny().fit(COHORT.bags, COHORT.labels, validation=None)
    found = fitted.predict_log_proba(COHORT.bags)
    np.testing.assert_allclose(found, np.log(fitted.predict_proba(COHORT.bags)), atol=1e-12)
    far = fitted.predict_log_proba([np.full((1, 4), 1e6)])
    assert fitted.predict_proba([np.full((1, 4), 1e6)]).min() == 0
    assert np.isfinite(far).all()
    with pytest.warns(XmagWarning, match="no tiles"):
        empty = fitted.predict_log_proba([np.zeros((0, 4))])
    np.testing.assert_array_equal(np.exp(empty[0]), fitted.class_prior_)


@pytest.mark.parametrize(
    "estimator", [MILClassifier(), LinearProbe()], ids=["MILClassifier", "LinearProbe"]
)
def test_what_is_not_fitted_is_scikit_learns_own_error(estimator: Any) -> None:
    for method in ("predict", "predict_proba", "predict_log_proba"):
        with pytest.raises(NotFittedError, match="is not fitted; call fit") as caught:
            getattr(estimator, method)([[1.0]])
        assert isinstance(caught.value, InputError)
        again = pickle.loads(pickle.dumps(caught.value))
        assert isinstance(again, NotFittedError)
        assert str(again) == str(caught.value)


def test_a_pickle_predicts_the_same() -> None:
    fitted = tiny().fit(COHORT.bags, COHORT.labels, groups=COHORT.patients)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(
        again.predict_proba(COHORT.bags), fitted.predict_proba(COHORT.bags)
    )
    assert again.history_ == fitted.history_


def test_the_core_never_imports_scikit_learn() -> None:
    program = """
    import sys, tempfile
    import numpy as np
    from xmag.errors import InputError
    from xmag.mil import MILClassifier
    try:
        MILClassifier().predict([])
    except InputError as error:
        assert isinstance(error, AttributeError)
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(5, 4)) for _ in range(12)]
    clf = MILClassifier(epochs=1, device="cpu", aggregator_options={"embed_dim": 4})
    clf.fit(bags, [0, 1] * 6, groups=range(12)).predict(bags)
    clf.score(bags, [0, 1] * 6), clf.attention(bags[0]), repr(clf), clf.get_params()
    with tempfile.TemporaryDirectory() as folder:
        clf.save(folder)
        MILClassifier.load(folder)
    assert not [name for name in sys.modules if name.startswith(("sklearn", "pandas"))]
    """
    assert run_program(textwrap.dedent(program)) == ""
