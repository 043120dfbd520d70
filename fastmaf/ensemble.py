"""Networks that share their weights: a MADE under many orders and connections at once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any, Literal, NoReturn, cast, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastmaf import _arrays, _codec, _dask, _device, _files, _random, _tables, _within, _words, backends, masks
from fastmaf import layers as _layers
from fastmaf._networks import drawn, masked, rebuilt
from fastmaf.flow import Flow, _check_continuous, _framed
from fastmaf.layers import Autoregressive, Conditioner, Dense, Terminal
from fastmaf.record import FlowRecord

if TYPE_CHECKING:
    import os

    from fastmaf._arrays import Seed
    from fastmaf.train import Epoch, History

__all__ = ["Ensemble", "random_member"]

Array = NDArray[Any]


def _parameters_of(function: Callable[..., Any]) -> str:
    """The parameters in the docstring of a function, but for the line above them."""
    text = inspect.cleandoc(function.__doc__ or "").partition("Parameters\n----------\n")[2].partition("\n\nReturns")[0]
    return text.replace("\n", "\n" + " " * 8)


class Ensemble:
    """Order- and connectivity-agnostic MADE (Germain et al. 2015, sections 4.2 and 4.3): one set of weights under several sets of masks.

    Its density is the mean of those of its members, each of which is a `Flow`. It comes from ``fastmaf.MADE(masks=...)`` or `fastmaf.load`.

    Parameters
    ----------
    flow : Flow
        With exactly one network, in an `Autoregressive` layer or in a `Terminal` base; its weights, degrees and ranks are not used.
    conditioner : Conditioner
        The weights, no mask applied. Its degrees are not used.
    ranks : (m, D) array of int
        Ranks of the variables for each member.
    degrees : (m, h) array of int
        Degrees of all hidden units, layer after layer, for each member.

    Attributes
    ----------
    features, context_features : int
    layers, context_layers : tuple
        Those of the first member.
    base : Normal or Terminal
        That of the first member.
    dtype : numpy.dtype
    names : tuple of str or None
    training : dict

    Raises
    ------
    ValueError
        If the flow has not one network, or the parts do not fit together.

    Examples
    --------
    >>> import fastmaf, numpy as np
    >>> ensemble = fastmaf.MADE(features=3, conditional="bernoulli", masks=4)
    >>> x = np.array([[0, 1, 1]])
    >>> members = [ensemble.member(k).log_prob(x)[0] for k in range(len(ensemble))]
    >>> np.allclose(np.exp(ensemble.log_prob(x)), np.exp(members).mean())
    True
    """

    def __init__(self, flow: Flow, conditioner: Conditioner, ranks: ArrayLike, degrees: ArrayLike) -> None:
        self._shared = _Shared(flow, conditioner, ranks, degrees)

    @property
    def conditioner(self) -> Conditioner:
        """The weights, no mask applied."""
        return self._shared.conditioner

    @property
    def ranks(self) -> Array:
        """Ranks of the variables for each member, (m, D)."""
        return self._shared.ranks

    @property
    def degrees(self) -> Array:
        """Degrees of all hidden units, layer after layer, for each member, (m, h)."""
        return self._shared.degrees

    @property
    def device(self) -> str:
        """Where the ensemble computes."""
        return "cpu"

    @property
    def _flow(self) -> Flow:
        return self._shared.member(0)

    @property
    def features(self) -> int:
        """Number of variables D."""
        return self._flow.features

    @property
    def context_features(self) -> int:
        """Number of variables C that the density is conditioned on."""
        return self._flow.context_features

    @property
    def layers(self) -> tuple[_layers.FlowLayer, ...]:
        """The layers of the first member."""
        return self._flow.layers

    @property
    def context_layers(self) -> tuple[_layers.Elementwise | _layers.Affine, ...]:
        """The layers that the context passes through first."""
        return self._flow.context_layers

    @property
    def base(self) -> _layers.Normal | Terminal:
        """The base of the first member."""
        return self._flow.base

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the arithmetic and of the results."""
        return self._flow.dtype

    @property
    def names(self) -> tuple[str, ...] | None:
        """One name for each variable."""
        return self._flow.names

    @property
    def training(self) -> dict[str, Any]:
        """How the ensemble came to its weights."""
        return self._flow.training

    # Members

    def __len__(self) -> int:
        return len(self.ranks)

    def member(self, k: int) -> Flow:
        """One of the flows whose densities are averaged.

        Parameters
        ----------
        k : int
            Below ``len(ensemble)``. The first has the plain order and balanced degrees, if the ensemble comes from `fastmaf.MADE`.

        Returns
        -------
        Flow

        Raises
        ------
        ValueError
            If there is no such member.

        Examples
        --------
        >>> import fastmaf
        >>> fastmaf.MADE(features=3, masks=4).member(0).order
        (0, 1, 2)
        """
        return self._shared.member(_arrays.count("k", k, limit=len(self)))

    def _still(self) -> Ensemble:
        """As in `Flow`."""
        still = Ensemble.__new__(Ensemble)
        still._shared = self._shared
        return still

    def _with(self, conditioner: Conditioner | None = None, **changes: Any) -> Ensemble:
        return Ensemble(self._flow._with(**changes), conditioner or self.conditioner, self.ranks, self.degrees)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_") or not hasattr(Flow, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise AttributeError(f"an ensemble has no {name}, since each member has an order and noise of its own: ensemble.member(k).{name}")

    # Evaluation

    def log_prob(self, x: ArrayLike, context: ArrayLike | None = None, out: Array | None = None) -> Array:
        """Log of the mean density of the members, in nats.

        Parameters
        ----------
        x, context, out : arrays
            As in `Flow.log_prob`.

        Returns
        -------
        (n,) or (c, n) array

        Raises
        ------
        ValueError
            If a shape or dtype does not fit.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> fastmaf.MADE(features=3, masks=4).log_prob(np.zeros((5, 3))).shape
        (5,)
        """
        given = x
        if _dask.among(x, context):
            if out is not None:
                raise ValueError("out is given, but x or context is an array of dask, of which only an array of dask comes; leave out out")
            return cast("Array", _dask.mapped(self._still(), "log_prob", "x", x, context, self.dtype, 0))
        x, context, shape = _arrays.rows("x", x, context, self.features, self.context_features, names=self.names)
        result = _arrays.empty(shape, self.dtype) if out is None else _arrays.output(out, shape, self.dtype, x, context)
        total, members = np.full(shape, -np.inf), self._shared.members()
        with np.errstate(invalid="ignore"):
            for member in members:
                np.logaddexp(total, member.log_prob(x, context), out=total)
        result[...] = total - math.log(len(members))
        return out if out is not None else _device.native(result, given)

    def log_prob_and_grad(self, x: ArrayLike, context: ArrayLike | None = None) -> tuple[Array, Array, Array | None]:
        """Log of the mean density of the members, and its gradients in x and in the context.

        Parameters
        ----------
        x, context : arrays
            As in `Flow.log_prob`.

        Returns
        -------
        value : (n,) or (c, n) array
        dx : array of the shape of x
        dcontext : array of the shape of the context, or None
            As in `Flow.log_prob_and_grad`.

        Raises
        ------
        ValueError
            If a shape or dtype does not fit; if the variables are discrete.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> value, dx, _ = fastmaf.MADE(features=3, masks=4).log_prob_and_grad(np.zeros((5, 3)))
        >>> value.shape, dx.shape
        ((5,), (5, 3))
        """
        _check_continuous(self._flow.record, "gradient in x")
        given, beside = x, context
        x, context = _arrays.real("x", x, names=self.names), None if context is None else _arrays.real("context", context)
        members = self._shared.members()
        values = [member.log_prob(x, context).astype(np.float64) for member in members]
        gradients = np.zeros(x.shape), np.zeros(() if context is None else context.shape)
        with np.errstate(all="ignore"):
            total = np.logaddexp.reduce(values)
            for member, value in zip(members, values, strict=True):
                share = np.where(total == -np.inf, 0.0, _exp(value - total))  # of the member in the density of the row
                for gradient, part in zip(gradients, member._backward(*member._ready(), x, context, share, False)[1:3], strict=True):
                    if part is not None:
                        gradient[...] += part
        value = (total - math.log(len(members))).astype(self.dtype)
        dx, dcontext = (gradient.astype(self.dtype) for gradient in gradients)
        return _device.native(value, given), _device.native(dx, given), None if context is None else _device.native(dcontext, beside)

    @overload
    def sample(
        self,
        n: int,
        context: ArrayLike | None = None,
        seed: Seed = None,
        offset: int = 0,
        context_offset: int = 0,
        out: Array | None = None,
        dtype: DTypeLike | None = None,
        *,
        within: _within.Within | None = None,
        max_tries: int = 1000,
        as_frame: None = None,
    ) -> Array: ...
    @overload
    def sample(
        self,
        n: int,
        context: ArrayLike | None = None,
        seed: Seed = None,
        offset: int = 0,
        context_offset: int = 0,
        out: Array | None = None,
        dtype: DTypeLike | None = None,
        *,
        within: _within.Within | None = None,
        max_tries: int = 1000,
        as_frame: str,
    ) -> Any: ...
    def sample(
        self,
        n: int,
        context: ArrayLike | None = None,
        seed: Seed = None,
        offset: int = 0,
        context_offset: int = 0,
        out: Array | None = None,
        dtype: DTypeLike | None = None,
        *,
        within: _within.Within | None = None,
        max_tries: int = 1000,
        as_frame: str | None = None,
    ) -> Any:
        """Draw from the ensemble: each row from a member drawn for it.

        Parameters
        ----------
        n, context, seed, offset, context_offset, out, dtype, within, max_tries, as_frame
            As in `Flow.sample`, splits by offset included.

        Returns
        -------
        (n, D) or (c, n, D) array, or a data frame

        Raises
        ------
        ValueError
            If a shape, dtype, seed or offset does not fit; if too few rows lie within.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> ensemble = fastmaf.MADE(features=3, masks=4)
        >>> np.array_equal(ensemble.sample(10, seed=1)[6:], ensemble.sample(4, seed=1, offset=6))
        True
        """
        record = self._flow.record
        if type(max_tries) is not int or max_tries < 1:
            max_tries = _words.count("max_tries", max_tries, 1)
        if as_frame is not None:
            return _framed(self, as_frame, out, n, context, seed, offset, context_offset, dtype, within, max_tries)
        if within is not None:
            return _within.sample(record, self._drawing, n, context, seed, offset, context_offset, out, dtype, within, max_tries)
        n = _arrays.count("n", n)
        given = context
        context, c = _arrays.contexts(context, self.context_features, usual=record.usual_contexts)
        seed, offset, context_offset = _arrays.seed_and_offsets(seed, offset, context_offset, n, c)
        shape = (c, n) if context is not None and context.ndim == 2 else (n,)
        dtype = record.sample_dtype(dtype, out)
        shape = (*shape, self.features)
        samples = _arrays.empty(shape, dtype) if out is None else _arrays.output(out, shape, dtype, context)
        draw, rows = self._drawing(context, seed, context_offset, dtype), samples.reshape(c * n, self.features)
        group, index = np.divmod(np.arange(c * n), n) if n else 2 * (np.empty(0, np.int64),)
        draw(index.astype(np.uint64) + np.uint64(offset), group, rows)
        return out if out is not None else _device.native(samples, given)

    def acceptance(
        self, within: _within.Within, context: ArrayLike | None = None, n: int = 10_000, seed: Seed = None, context_offset: int = 0
    ) -> Any:
        """The share of samples that lie in a box.

        Parameters
        ----------
        within, context, n, seed, context_offset
            As in `Flow.acceptance`.

        Returns
        -------
        float, or (c,) array under contexts (c, C)

        Raises
        ------
        ValueError
            If a shape, seed or offset does not fit.

        Examples
        --------
        >>> import fastmaf
        >>> fastmaf.MADE(features=3, masks=4).acceptance([None, None, None])
        1.0
        """
        return _within.acceptance(self._flow.record, self._drawing, within, context, n, seed, context_offset)

    def _drawing(self, context: Array | None, seed: int, context_offset: int, dtype: np.dtype[Any]) -> Callable[..., Array]:
        """Draws samples of the counted stream under some of the contexts."""

        def draw(index: Array, group: Array, out: Array | None = None) -> Array:
            rows = np.empty((len(index), self.features), dtype) if out is None else out
            index, row = index.astype(np.uint64), group.astype(np.uint64) + np.uint64(context_offset)
            chosen = self._choices(index, row, seed)
            for k, member in enumerate(self._shared.members()):
                own = np.flatnonzero(chosen == k)
                if own.size:
                    contexts = context if context is None or context.ndim == 1 else context[group[own]]
                    drawn = np.empty((own.size, self.features), dtype)
                    record, backend = member._ready()
                    backend.sample_rows(record, index[own], row[own], contexts, seed, drawn)
                    rows[own] = drawn
            return rows

        return draw

    def sample_and_log_prob(
        self,
        n: int,
        context: ArrayLike | None = None,
        seed: Seed = None,
        offset: int = 0,
        context_offset: int = 0,
        dtype: DTypeLike | None = None,
    ) -> tuple[Array, Array]:
        """Draw from the ensemble, and give the log of the mean density of each row drawn.

        Parameters
        ----------
        n, context, seed, offset, context_offset, dtype
            As in `sample`.

        Returns
        -------
        samples : (n, D) or (c, n, D) array
            Those of `sample`.
        log_prob : (n,) or (c, n) array
            Those of `log_prob`.

        Raises
        ------
        ValueError
            As in `sample`.

        Examples
        --------
        >>> import fastmaf
        >>> samples, log_prob = fastmaf.MADE(features=3, masks=4).sample_and_log_prob(10, seed=1)
        >>> samples.shape, log_prob.shape
        ((10, 3), (10,))
        """
        samples = self.sample(n, context, seed, offset, context_offset, dtype=dtype)
        return samples, self.log_prob(samples, context)

    def _choices(self, index: Array, row: Array, seed: int) -> Array:
        """The member of each row: a number of the stream of components in the column behind the last variable."""
        return _random.choices(seed, index, row, self.features, len(self))

    # Parameters

    def parameters(self) -> Array:
        """All weights and biases in one vector, in the order of `Flow.parameters`; no mask is applied.

        Returns
        -------
        (p,) array

        Examples
        --------
        >>> import fastmaf
        >>> fastmaf.MADE(features=2, hidden_features=(3,), masks=4).parameters().shape
        (25,)
        """
        return np.concatenate([array.ravel() for array in _weights(self.conditioner)])

    def with_parameters(self, parameters: ArrayLike) -> Ensemble:
        """An ensemble with other weights and biases.

        Parameters
        ----------
        parameters : (p,) array
            In the order of `parameters`. A weight counts for the members whose masks leave it.

        Returns
        -------
        Ensemble

        Raises
        ------
        ValueError
            If the vector has another length.

        Examples
        --------
        >>> import fastmaf
        >>> ensemble = fastmaf.MADE(features=3, masks=4)
        >>> len(ensemble.with_parameters(0.5 * ensemble.parameters()))
        4
        """
        return self._with(self._filled(parameters))

    def _filled(self, parameters: ArrayLike) -> Conditioner:
        vector = _arrays.real("parameters", parameters)
        sizes = [array.size for array in _weights(self.conditioner)]
        if vector.shape != (sum(sizes),):
            raise ValueError(f"parameters has shape {vector.shape}; the ensemble has {sum(sizes)} parameters")
        arrays = iter(np.split(vector.astype(self.dtype), np.cumsum(sizes)))

        def take(old: Array | None) -> Array | None:
            return None if old is None else next(arrays).reshape(old.shape)

        def refill(dense: Dense) -> Dense:
            changes: dict[str, Any] = {name: take(getattr(dense, name)) for name in _NAMES}
            return replace(dense, **changes)

        net = rebuilt(self.conditioner, refill)
        return replace(net, skip=take(net.skip))

    def astype(self, dtype: DTypeLike) -> Ensemble:
        """The same ensemble in another precision.

        Parameters
        ----------
        dtype : {"float32", "float64"}

        Returns
        -------
        Ensemble

        Raises
        ------
        ValueError
            For any other dtype.

        Examples
        --------
        >>> import fastmaf
        >>> fastmaf.MADE(features=3, masks=4).astype("float64").dtype
        dtype('float64')
        """
        return self._with(dtype=_arrays.float_dtype(dtype))

    # Training

    def reset(self, seed: Seed = None) -> None:
        """Start anew, in place, with new shared weights; the masks of the members stay.

        Parameters
        ----------
        seed : int, numpy.random.Generator or SeedSequence, optional
            As in `Flow.reset`.

        Raises
        ------
        ValueError
            If the seed is out of range.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> ensemble = fastmaf.MADE(features=3, masks=4, seed=1)
        >>> before = ensemble.parameters()
        >>> ensemble.reset(seed=2)
        >>> ensemble.reset(seed=1)
        >>> np.array_equal(ensemble.parameters(), before)
        True
        """
        record, base = self._flow.record.anew(_arrays.seed_or_fresh(seed)), self.base
        components = base.components if isinstance(base, Terminal) and base.conditional == "mixture" else 0
        net = drawn(self.conditioner, self.features, np.random.default_rng(record.training["init_seed"]), components)
        self._shared = _Shared(self._flow._holding(record), net, self.ranks, self.degrees)

    def fit(
        self,
        x: ArrayLike | Callable[[int], ArrayLike],
        context: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        *,
        validation: float | ArrayLike | tuple[ArrayLike | None, ...] = 0.1,
        batch_size: int = 256,
        optimizer: str = "adam",
        lr: float = 1e-3,
        schedule: str | Callable[[float], float] = "constant",
        l2: float = 0.0,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        patience: int | None = 30,
        max_epochs: int = 1000,
        max_seconds: float | None = None,
        standardize: bool | Literal["again"] = True,
        device: str = "auto",
        seed: Seed = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: float = 1,
        resume: bool = False,
        callback: Callable[[Epoch], object] | None = None,
        on_interrupt: Literal["raise", "return"] = "raise",
        progress: bool | None = None,
        resample: bool = False,
    ) -> History:
        """Train the shared weights in place by maximum likelihood: each step those of one member, in turn.

        The validation log-likelihood is that of the ensemble. All else is as in `Flow.fit`.

        Parameters
        ----------
        {parameters}
        resample : bool
            Train other members in every epoch, drawn by the seed and the epoch: order-agnostic training over all orders instead of those of
            the ensemble. The members stay what they are for validation and evaluation.

        Examples
        --------
        >>> import fastmaf, numpy as np
        >>> ensemble = fastmaf.MADE(features=2, hidden_features=(8,), masks=3, seed=0)
        >>> x = np.random.default_rng(0).normal(size=(500, 2))
        >>> history = ensemble.fit(x, max_epochs=2, seed=0, progress=False)
        """
        from fastmaf import train  # as in `Flow.fit`

        shared = self._shared

        def draw(epoch: int, seed: int) -> list[Flow]:
            numbers = ((seed, epoch, k) for k in range(len(shared.ranks)))
            drawn = (random_member(shared.conditioner, shared.ranks[0], self.context_features > 0, *number) for number in numbers)
            return [shared.masked(*member) for member in drawn]

        def build(flow: Flow, weights: Array) -> Ensemble:
            return Ensemble(flow, self._filled(weights), shared.ranks, shared.degrees)

        flow, names = self._flow._with(), _tables.names_of(x)
        if flow.names is None and names is not None:
            flow.names = names
        before = flow.record
        members = train.Members(shared.members(), self.parameters(), draw if _words.flag("resample", resample) else None, build)
        try:
            return train.fit(
                flow,
                x,
                context,
                weights,
                validation=validation,
                batch_size=batch_size,
                optimizer=optimizer,
                lr=lr,
                schedule=schedule,
                l2=l2,
                weight_decay=weight_decay,
                clip_norm=clip_norm,
                patience=patience,
                max_epochs=max_epochs,
                max_seconds=max_seconds,
                standardize=standardize,
                device=device,
                seed=seed,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                resume=resume,
                callback=callback,
                on_interrupt=on_interrupt,
                progress=progress,
                members=members,
            )
        finally:
            if flow.record is not before:  # trained, if only until an exception
                self._shared = _Shared(flow, self._filled(members.weights), shared.ranks, shared.degrees)

    fit.__doc__ = (fit.__doc__ or "").replace("{parameters}", _parameters_of(Flow.fit))

    # Files and words

    def save(self, path_or_file: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write the ensemble to one .safetensors file; `fastmaf.load` reads it.

        Parameters
        ----------
        path_or_file : path or binary file
            As in `Flow.save`.

        Examples
        --------
        >>> import fastmaf, io
        >>> file = io.BytesIO()
        >>> fastmaf.MADE(features=3, masks=4).save(file)
        >>> len(fastmaf.load(file.getvalue()))
        4
        """
        _files.save(_codec.to_bytes(*self._parts()), path_or_file)

    def _parts(self) -> tuple[FlowRecord, _codec.Members]:
        """What files hold."""
        return self._flow.record, _codec.Members(self.conditioner, self.ranks, self.degrees)

    def __reduce__(self) -> Any:
        return _revived, (_codec.to_bytes(*self._parts()),)

    def __repr__(self) -> str:
        return repr(self._flow).replace("Flow(", f"Ensemble(masks={len(self)}, ", 1)

    def summary(self) -> str:
        """The table of the first member, and how many share its weights.

        Returns
        -------
        str

        Examples
        --------
        >>> import fastmaf
        >>> print(fastmaf.MADE(2, "bernoulli", hidden_features=(3,), masks=4).summary())
        layer     what                                     weights
        Terminal  2 -> 3 -> 2, relu, bernoulli, order 0 1       11
        total     2 features, float32                           11
        4 members share 17 weights
        """
        return f"{self._flow.summary()}\n{len(self)} members share {self.parameters().size:,} weights"


def _revived(data: bytes) -> Ensemble:
    """An ensemble that comes out of a pickle."""
    record, members = _codec.from_bytes(data)
    assert members is not None
    return Ensemble(Flow._of(record), *members)


def _exp(x: Array) -> Array:
    """By the compiled core if there is one: NumPy's differs in the last bit from one instruction set to another, and from libfastmaf's."""
    core = backends.core()
    return np.exp(x) if core is None else np.asarray(core.exp(x))


class _Shared:
    """What an ensemble is, checked when made and never changed: a flow but for its network, the weights, and the masks of its members."""

    def __init__(self, flow: Flow, conditioner: Conditioner, ranks: ArrayLike, degrees: ArrayLike) -> None:
        _words.of_type("flow", flow, Flow)
        _words.of_type("conditioner", conditioner, Conditioner)
        networks = [record for record in (*flow.layers, flow.base) if isinstance(record, (Autoregressive, Terminal))]
        if len(networks) != 1:
            raise ValueError(f"the flow has {len(networks)} networks; an ensemble needs exactly one")
        units = sum(dense.bias.size for dense in conditioner.hidden)
        self.ranks = _integers("ranks", ranks, flow.features, "feature")
        self.degrees = _integers("degrees", degrees, units, "hidden unit")
        if len(self.ranks) != len(self.degrees) or not len(self.ranks):
            raise ValueError(f"ranks has {len(self.ranks)} rows and degrees {len(self.degrees)}; there must be one for each member")
        self.conditioner: Conditioner = _layers.astype(with_degrees(conditioner, self.degrees[0]), flow.dtype)
        self._front = flow
        self._made: dict[int, Flow] = {}
        self.member(0)

    def member(self, k: int) -> Flow:
        """The flow of a member."""
        found = self._made.get(k)
        return found or self._made.setdefault(k, self.masked(self.ranks[k], self.degrees[k]))

    def members(self) -> list[Flow]:
        """The flows of all members."""
        return [self.member(k) for k in range(len(self.ranks))]

    def masked(self, ranks: Array, degrees: Array) -> Flow:
        """The flow under some masks."""
        flow, categories = self._front, getattr(self._front.base, "categories", ())
        net = masked(with_degrees(self.conditioner, degrees), ranks, categories)
        if isinstance(flow.base, Terminal):
            return flow._with(base=replace(flow.base, ranks=ranks, conditioner=net))
        layers = [replace(layer, ranks=ranks, conditioner=net) if isinstance(layer, Autoregressive) else layer for layer in flow.layers]
        return flow._with(layers=layers)


_NAMES = ("weight", "bias", "context_weight", "context_bias")


def _weights(net: Conditioner) -> Iterator[Array]:
    """The trainable arrays of a network, in the order of `Flow.parameters`."""
    arrays = [getattr(dense, name) for dense in (*net.hidden, net.final) for name in _NAMES]
    return (array for array in (*arrays, net.skip) if array is not None)


def _integers(name: str, value: ArrayLike, columns: int, what: str) -> Array:
    array = _layers._frozen(name, value, 2, "i")
    if array.shape[1] != columns:
        raise ValueError(f"{name} has shape {_words.shapes(array.shape)}; it must hold an integer for each {what}, {columns} a row")
    return array


def with_degrees(net: Conditioner, degrees: Array) -> Conditioner:
    """The network with other degrees, given for all hidden units in one vector."""
    pieces = iter(np.split(degrees, np.cumsum([dense.bias.size for dense in net.hidden])))
    return rebuilt(net, lambda dense: dense if dense is net.final else replace(dense, degrees=next(pieces)))


def random_member(net: Conditioner, ranks: Array, conditional: bool, seed: int, *number: int) -> tuple[Array, Array]:
    """Ranks of the variables and degrees of all hidden units, drawn by seed and number alone.

    The units that a residual block adds to others have the degrees of those.

    Examples
    --------
    >>> import fastmaf
    >>> net = fastmaf.MADE(features=3, hidden_features=(5,)).layers[-1].conditioner
    >>> ranks, degrees = random_member(net, np.array([1, 2, 3]), False, 0, 1)
    >>> sorted(ranks.tolist()), degrees.shape
    ([1, 2, 3], (5,))
    """
    rng = np.random.default_rng([seed, 0x6D61, *number])
    order = rng.permutation(ranks)

    def draw(dense: Dense, lowest: int) -> Array:
        return masks.random_degrees(dense.bias.size, ranks.size, conditional, rng, lowest)

    degrees = [] if net.initial is None else [draw(net.initial, 0)]
    for block in net.blocks:
        degrees.append(draw(block.maps[0], int(degrees[-1].min())))
        if block.residual:
            degrees.append(degrees[-2])
    return order, np.concatenate([np.empty(0, np.int64), *degrees])
