"""Flows as estimators of scikit-learn (``pip install 'fastmaf[sklearn]'``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastmaf import _arrays, _tables, _words, maf
from fastmaf.ensemble import Ensemble
from fastmaf.train import data

try:
    from sklearn.base import BaseEstimator, DensityMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted
except ImportError:
    raise ImportError("fastmaf.sklearn needs scikit-learn, which is not installed: pip install 'fastmaf[sklearn]'") from None

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # before scikit-learn 1.6

    def validate_data(estimator: Any, X: Any, **options: Any) -> Any:
        """The rows as an array, and what the estimator remembers of their columns."""
        return estimator._validate_data(X, **options)


if TYPE_CHECKING:
    from fastmaf.flow import Flow
    from fastmaf.train import History

__all__ = ["MAFDensity"]

Array = NDArray[Any]


class MAFDensity(DensityMixin, BaseEstimator):
    """A masked autoregressive flow as an estimator: the density of rows, learned by `fit`.

    Every fit starts anew. What the estimator cannot do (a context, gradients, noise, files) its flow can: ``estimator.flow_``.

    Parameters
    ----------
    transforms, hidden_features, activation, order, residual, batch_norm, components, bounds, dtype, linear, direct, clip, input_clip
        Of the flow, as in `fastmaf.MAF`. Columns of a data frame give the flow its names, by which bounds can go too.
    validation, patience, max_epochs, max_seconds
        When to stop, as in `fastmaf.Flow.fit`. Of a fraction of few rows one row is held out at least.
    members : int
        With more than one, so many independent flows, whose densities are averaged: a `fastmaf.Ensemble`.
    batch_size, optimizer, lr, schedule, l2, weight_decay, clip_norm, standardize, on_interrupt, progress
        How to train, as in `fastmaf.Flow.fit`.
    random_state : int, numpy.random.RandomState, numpy.random.Generator or None
        Of the first weights, of random orders, of the rows held out and of the order of rows. An int is the seed of `fastmaf.MAF` and of
        its fit. None takes numbers of the generator that NumPy has for all, as everywhere in scikit-learn.

    Attributes
    ----------
    flow_ : fastmaf.Flow or fastmaf.Ensemble
        The fitted flow.
    history_ : fastmaf.History, or list of them
        What happened in the fit, of each member.
    n_features_in_ : int
        Number of columns of the rows that it was fitted to.
    feature_names_in_ : (n_features_in_,) array of str
        Their names, where they came as a data frame whose column names are text.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal([1.0, -2.0], [0.5, 3.0], (500, 2))
    >>> density = MAFDensity(transforms=1, hidden_features=(8,), max_epochs=3, random_state=0).fit(X)
    >>> density.score_samples(X).shape, density.sample(10, random_state=0).shape
    ((500,), (10, 2))
    """

    flow_: Flow | Ensemble
    history_: History | list[History]
    n_features_in_: int
    feature_names_in_: Array

    def __init__(
        self,
        *,
        transforms: int = 5,
        hidden_features: Sequence[int] = (100, 100),
        activation: str = "relu",
        order: maf.Order = "reverse",
        residual: bool = False,
        batch_norm: bool | str = False,
        components: int = 1,
        bounds: maf.Bounds | None = None,
        dtype: DTypeLike = "float32",
        linear: bool = False,
        direct: bool = False,
        clip: float | None = None,
        input_clip: float | None = maf.INPUT_CLIP,
        members: int = 1,
        validation: float | ArrayLike | tuple[ArrayLike | None, ...] = 0.1,
        patience: int | None = 30,
        max_epochs: int = 1000,
        max_seconds: float | None = None,
        batch_size: int = 256,
        optimizer: str = "adam",
        lr: float = 1e-3,
        schedule: str | Callable[[float], float] = "constant",
        l2: float = 0.0,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        standardize: bool | Literal["full"] = True,
        on_interrupt: Literal["raise", "return"] = "raise",
        progress: bool | None = False,
        random_state: Any = None,
    ) -> None:
        self.transforms = transforms
        self.hidden_features = hidden_features
        self.activation = activation
        self.order = order
        self.residual = residual
        self.batch_norm = batch_norm
        self.components = components
        self.bounds = bounds
        self.dtype = dtype
        self.linear = linear
        self.direct = direct
        self.clip = clip
        self.input_clip = input_clip
        self.members = members
        self.validation = validation
        self.patience = patience
        self.max_epochs = max_epochs
        self.max_seconds = max_seconds
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.lr = lr
        self.schedule = schedule
        self.l2 = l2
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        self.standardize = standardize
        self.on_interrupt = on_interrupt
        self.progress = progress
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None) -> MAFDensity:
        """Fit a new flow to rows.

        Parameters
        ----------
        X : (n, n_features) array or data frame
        y : None
            Ignored; pipelines and searches hand it over.
        sample_weight : (n,) array, optional
            Not negative. Rows of weight zero have no part in the fit.

        Returns
        -------
        MAFDensity
            Itself.

        Raises
        ------
        ValueError
            If there are fewer than two rows, or `fastmaf.MAF` or `fastmaf.Flow.fit` refuse parameters or data.

        Warns
        -----
        fastmaf.FitWarning
            As in `fastmaf.Flow.fit`.
        """
        if sample_weight is None and _tables.is_weighted(X):
            _words.warn(
                "X has weights of its own, which a fit takes only if they are given: sample_weight=X.get_weights()", data.FitWarning
            )
        X = validate_data(self, X, dtype=_DTYPES, ensure_min_samples=2)
        weights = None if sample_weight is None else _arrays.weights("sample_weight", sample_weight)
        if weights is not None and len(weights) != len(X):
            raise ValueError(f"sample_weight has {len(weights)} rows; X has {len(X)}")
        seed = _seed(self.random_state)
        parameters = self.get_params(deep=False)
        members = _words.count("members", self.members, 1)
        flow: Flow | Ensemble = maf.MAF(
            self.n_features_in_, names=getattr(self, "feature_names_in_", None), seed=seed, **{name: parameters[name] for name in _OF_FLOW}
        )
        if members > 1:
            flow = Ensemble(cast("Flow", flow), members, seed)
        settings = {name: parameters[name] for name in _OF_FIT}
        settings["validation"] = _validation(self.validation, len(X) if weights is None else int(np.count_nonzero(weights)))
        history = flow.fit(X, weights=weights, seed=seed, **settings)
        self.flow_, self.history_ = flow, history
        return self

    def score_samples(self, X: Any) -> Array:
        """Log-density of rows, in nats.

        Parameters
        ----------
        X : (n, n_features) array or data frame
            Finite.

        Returns
        -------
        (n,) array
            In the dtype of the flow.

        Raises
        ------
        ValueError
            If the columns are not those of the fit, or a number is not finite.
        """
        check_is_fitted(self)
        return self.flow_.log_prob(validate_data(self, X, dtype=_DTYPES, reset=False))

    def score(self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None) -> float:
        """Mean log-density of rows, in nats; the larger the better.

        Parameters
        ----------
        X : (n, n_features) array or data frame
        y : None
            Ignored.
        sample_weight : (n,) array, optional
            Of the rows in the mean.

        Returns
        -------
        float

        Raises
        ------
        ValueError
            As in `score_samples`; if the weights do not fit.
        """
        values = self.score_samples(X).astype(np.float64)
        if sample_weight is None:
            return float(values.mean())
        weights = _arrays.weights("sample_weight", sample_weight)
        if len(weights) != len(values):
            raise ValueError(f"sample_weight has {len(weights)} rows; X has {len(values)}")
        return float(np.average(values[weights > 0], weights=weights[weights > 0]))

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Array:
        """Draw rows from the fitted flow.

        Parameters
        ----------
        n_samples : int
        random_state : int, numpy.random.RandomState, numpy.random.Generator or None
            An int is the seed of `fastmaf.Flow.sample`; None as in the constructor.

        Returns
        -------
        (n_samples, n_features) array
            In the dtype of the flow.

        Raises
        ------
        ValueError
            If an argument is out of range.
        """
        check_is_fitted(self)
        return self.flow_.sample(_arrays.count("n_samples", n_samples), seed=_seed(random_state))


_OF_FLOW = (
    "transforms",
    "hidden_features",
    "activation",
    "order",
    "residual",
    "batch_norm",
    "components",
    "bounds",
    "dtype",
    "linear",
    "direct",
    "clip",
    "input_clip",
)
_OF_FIT = (
    "patience",
    "max_epochs",
    "max_seconds",
    "batch_size",
    "optimizer",
    "lr",
    "schedule",
    "l2",
    "weight_decay",
    "clip_norm",
    "standardize",
    "on_interrupt",
    "progress",
)
_DTYPES = (np.float64, np.float32)


def _seed(random_state: Any) -> int:
    """A seed from what scikit-learn takes as a random state."""
    if random_state is None or random_state is np.random or isinstance(random_state, np.random.RandomState):
        high, low = check_random_state(random_state).randint(2**32, size=2, dtype=np.uint64)
        return (int(high) << 32) + int(low)
    if isinstance(random_state, (np.random.Generator, np.random.BitGenerator, np.random.SeedSequence)):
        return _arrays.seed_or_fresh(random_state)
    return _words.count("random_state", random_state, limit=2**64, must="an integer, a RandomState, a Generator or None")


def _validation(value: Any, rows: int) -> Any:
    """The argument of `Flow.fit`: a fraction that would hold out none of some rows holds out one, unless it is the only one."""
    held = data.validation_of(value)
    return 1 / rows if isinstance(held, float) and held and rows > 1 and not round(held * rows) else held
