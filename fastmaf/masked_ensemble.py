"""Networks that share their weights: a MADE under many orders and connections at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmaf import _arrays, _codec, _tables, _words, masks
from fastmaf import layers as _layers
from fastmaf._networks import masked, rebuilt, redrawn
from fastmaf.ensemble import Ensemble, parameters_of
from fastmaf.flow import Flow, _here
from fastmaf.layers import Autoregressive, Conditioner, Dense, Terminal
from fastmaf.record import FlowRecord

if TYPE_CHECKING:
    import os

    from fastmaf._arrays import Seed
    from fastmaf.train import Epoch, History

__all__ = ["MaskedEnsemble", "random_member"]

Array = NDArray[Any]


class MaskedEnsemble(Ensemble):
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
    training : dict
        And all that `Ensemble` has.

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
    def training(self) -> dict[str, Any]:
        """How the ensemble came to its weights."""
        return self._flow.training

    def __len__(self) -> int:
        return len(self.ranks)

    def _flows(self) -> Sequence[Flow]:
        return self._shared.members()

    def _member(self, k: int) -> Flow:
        return self._shared.member(k)

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

    def with_parameters(self, parameters: ArrayLike) -> MaskedEnsemble:
        """An ensemble with other weights and biases.

        Parameters
        ----------
        parameters : (p,) array
            In the order of `parameters`. A weight counts for the members whose masks leave it.

        Returns
        -------
        MaskedEnsemble

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
        return MaskedEnsemble(self._flow, self._filled(parameters), self.ranks, self.degrees)

    def _joined(self, parts: Sequence[Array]) -> Array:
        return np.sum(parts, axis=0, dtype=np.float64).astype(self.dtype)

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

    def _changed(self, change: Callable[[Flow], Flow]) -> Any:
        return MaskedEnsemble(change(self._flow), self.conditioner, self.ranks, self.degrees)

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
        record = self._flow.record.anew(_arrays.seed_or_fresh(seed))
        first = self.member(0).record  # whose masks are those of the flow without others
        made = next(own for own in (*first.layers, first.base) if isinstance(own, (Autoregressive, Terminal)))
        net = with_degrees(self.conditioner, self.degrees[0])
        net = redrawn(made, net, np.random.default_rng(record.training["init_seed"]))
        self._shared = _Shared(self._flow._holding(record), net, self.ranks, self.degrees)

    def fit(  # type: ignore[override]
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
        standardize: bool | Literal["again", "full"] = True,
        device: str = "auto",
        seed: Seed = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: float = 1,
        resume: bool = False,
        callback: Callable[[Epoch], object] | None = None,
        on_interrupt: Literal["raise", "return"] = "raise",
        progress: bool | None = None,
        comm: Any = None,
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

        with train.ranks_of(comm) as ranks:
            shared = self._shared

            def draw(epoch: int, seed: int) -> list[Flow]:
                numbers = ((seed, epoch, k) for k in range(len(shared.ranks)))
                drawn = (random_member(shared.conditioner, shared.ranks[0], self.context_features > 0, *number) for number in numbers)
                return [shared.masked(*member) for member in drawn]

            def build(flow: Flow, weights: Array) -> MaskedEnsemble:
                return MaskedEnsemble(flow, self._filled(weights), shared.ranks, shared.degrees)

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
                    ranks=ranks,
                    members=members,
                )
            finally:
                if flow.record is not before:  # trained, if only until an exception
                    self._shared = _Shared(flow, self._filled(members.weights), shared.ranks, shared.degrees)

    fit.__doc__ = (fit.__doc__ or "").replace("{parameters}", parameters_of(Flow.fit))

    # Files and words

    def _parts(self) -> tuple[FlowRecord, _codec.Members]:
        """What files hold."""
        return self._flow.record, _codec.Members(self.conditioner, self.ranks, self.degrees)

    def __reduce__(self) -> Any:
        return _revived, (_codec.to_bytes(*self._parts()), self.device, self.precision)

    def __repr__(self) -> str:
        return repr(self._flow).replace("Flow(", f"MaskedEnsemble(masks={len(self)}, ", 1)

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


def _revived(data: bytes, device: str, precision: str) -> MaskedEnsemble:
    """An ensemble that comes out of a pickle."""
    record, members = _codec.from_bytes(data)
    assert isinstance(members, _codec.Members)
    return MaskedEnsemble(Flow._of(record, _here(device, precision)), *members)


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
        flow, base = self._front, self._front.base
        net = masked(with_degrees(self.conditioner, degrees), ranks, base.rows if isinstance(base, Terminal) else None)
        if isinstance(base, Terminal):
            return flow._with(base=replace(base, ranks=ranks, conditioner=net))
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
