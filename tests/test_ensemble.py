"""`Ensemble`: independent flows whose densities are averaged."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
import re
import threading
import time
import warnings
from contextlib import nullcontext

import make
import numpy as np
import pytest
import safetensors.numpy
import scipy.special
import scipy.stats

import fastmaf
from fastmaf import backends
from fastmaf.train import FitWarning, fit_members

MODELS = {
    "maf": lambda **options: fastmaf.MAF(3, transforms=2, hidden_features=(7, 5), **options),
    "context": lambda **options: fastmaf.MAF(3, 2, transforms=2, hidden_features=(7,), bounds=[None, (0, 1), (2, None)], **options),
    "mixture": lambda **options: fastmaf.MADE(3, "mixture", components=3, hidden_features=(6,), **options),
    "bernoulli": lambda **options: fastmaf.MADE(3, "bernoulli", hidden_features=(6,), **options),
}


def model(name, members=3, dtype="float64", names=None):
    return fastmaf.Ensemble(MODELS[name](dtype=dtype, seed=0, names=names), members=members, seed=1)


def rows(ensemble, n=12):
    context = make.contexts(ensemble, n)
    return (ensemble.sample(1, context, seed=1)[:, 0] if context is not None else ensemble.sample(n, seed=1)), context


def data(n=400):
    return np.random.default_rng(0).normal([1.0, -2.0, 0.5], [0.5, 3.0, 1.0], (n, 3))


def fitted(members=3, **options):
    ensemble = fastmaf.Ensemble(fastmaf.MAF(3, transforms=1, hidden_features=(8,), seed=0), members=members, seed=1)
    histories = ensemble.fit(data(), **{"max_epochs": 3, "seed": 5, **options})
    return ensemble, histories


def test_members_are_new_flows_of_the_same_architecture():
    flow = fastmaf.MAF(3, transforms=2, hidden_features=(7,), order="random", seed=0, names=["a", "b", "c"])
    ensemble = fastmaf.Ensemble(flow, members=4, seed=1)
    assert len(ensemble) == 4 and ensemble.names == ("a", "b", "c") and ensemble.features == 3
    vectors = [ensemble.member(k).parameters() for k in range(4)]
    assert all((a != b).any() for k, a in enumerate(vectors) for b in [*vectors[:k], flow.parameters()])
    for k in range(4):
        for mine, theirs in zip(ensemble.member(k).layers, flow.layers, strict=True):
            assert getattr(mine, "ranks", 0) is getattr(theirs, "ranks", 0) or np.array_equal(mine.ranks, theirs.ranks)
    more = fastmaf.Ensemble(flow, members=6, seed=1)
    assert np.array_equal(more.parameters()[: ensemble.parameters().size], ensemble.parameters())
    assert (fastmaf.Ensemble(flow, members=4).parameters() != ensemble.parameters()).any()


def test_an_ensemble_of_given_flows_is_apart_from_them():
    flows = [fastmaf.MAF(3, transforms=k + 1, seed=k) for k in range(3)]
    ensemble = fastmaf.Ensemble(flows)
    before = ensemble.log_prob(np.zeros((2, 3)))
    flows[0].fit(data(), max_epochs=1)
    ensemble.member(1).fit(data(), max_epochs=1)
    assert np.array_equal(ensemble.log_prob(np.zeros((2, 3))), before)


@pytest.mark.parametrize("name", MODELS)
def test_density_is_the_mean_of_those_of_the_members(name, dtype):
    ensemble = model(name, dtype=dtype)
    x, context = rows(ensemble)
    members = [ensemble.member(k).log_prob(x, context).astype(float) for k in range(3)]
    expected = (scipy.special.logsumexp(members, axis=0) - np.log(3)).astype(dtype)
    assert np.array_equal(ensemble.log_prob(x, context), expected) or np.allclose(ensemble.log_prob(x, context), expected, rtol=1e-6)
    assert ensemble.log_prob(x, context).dtype == dtype
    samples, density = ensemble.sample_and_log_prob(5, None if context is None else context[:2], seed=3)
    assert samples.shape[:-1] == density.shape == ((5,) if context is None else (2, 5))
    assert np.array_equal(
        ensemble.sample(4, context if context is None else context[0], seed=3)[2:],
        ensemble.sample(2, None if context is None else context[0], seed=3, offset=2),
    )


def test_samples_come_from_all_members():
    apart = [fastmaf.Flow([fastmaf.layers.Affine([100.0 * k], [1.0])], dtype="float64") for k in range(4)]
    x = fastmaf.Ensemble(apart).sample(4000, seed=1)[:, 0]
    which = np.rint(x / 100)
    counts = np.bincount(which.astype(int), minlength=4)
    assert counts.sum() == 4000 and (np.abs(counts - 1000) < 5 * math.sqrt(750)).all()
    assert scipy.stats.kstest(x - 100 * which, "norm").pvalue > 1e-4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("masks", [False, True])
def test_gradients_are_those_of_the_mean_density(name, masks):
    if masks:
        options = {"conditional": name} if name in ("mixture", "bernoulli") else {"context_features": 2 * (name == "context")}
        ensemble = fastmaf.MADE(3, masks=3, hidden_features=(6, 5), direct=True, dtype="float64", seed=0, **options)
    else:
        ensemble = model(name)
    x, context = rows(ensemble, 6)
    cotangent = np.random.default_rng(2).normal(size=6)
    dx, dcontext, dparameters = ensemble.vjp(x, context, cotangent)

    def value(x, context, parameters):
        return float(cotangent @ ensemble.with_parameters(parameters).log_prob(x, context))

    at = ensemble.parameters()
    rng = np.random.default_rng(3)
    step = rng.normal(size=at.size) * (at != 0)
    assert math.isclose(
        (value(x, context, at + 1e-6 * step) - value(x, context, at - 1e-6 * step)) / 2e-6, step @ dparameters, rel_tol=1e-5
    )
    if name == "bernoulli":
        assert dx is None
        return
    step = rng.normal(size=x.shape)
    slope = (value(x + 1e-7 * step, context, at) - value(x - 1e-7 * step, context, at)) / 2e-7
    assert math.isclose(slope, (step * dx).sum(), rel_tol=1e-4)
    ones = ensemble.vjp(x, context, np.ones(6))
    both = ensemble.log_prob_and_grad(x, context)
    assert np.array_equal(both[0], ensemble.log_prob(x, context)) and np.array_equal(both[1], ones[0])
    if context is not None:
        step = rng.normal(size=context.shape)
        slope = (value(x, context + 1e-6 * step, at) - value(x, context - 1e-6 * step, at)) / 2e-6
        assert math.isclose(slope, (step * dcontext).sum(), rel_tol=1e-5) and np.array_equal(both[2], ones[1])


@pytest.mark.parametrize("name", MODELS)
def test_files_and_copies(name, tmp_path):
    ensemble = model(name, names=["a", "b", "c"])
    x, context = rows(ensemble)
    ensemble.save(tmp_path / "ensemble.safetensors")
    others = [fastmaf.load(tmp_path / "ensemble.safetensors"), pickle.loads(pickle.dumps(ensemble)), copy.deepcopy(ensemble)]
    for other in others:
        assert type(other) is fastmaf.Ensemble and repr(other) == repr(ensemble) and other.names == ("a", "b", "c")
        assert np.array_equal(other.parameters(), ensemble.parameters())
        assert np.array_equal(other.log_prob(x, context), ensemble.log_prob(x, context))
        assert [other.member(k).training for k in range(3)] == [ensemble.member(k).training for k in range(3)]
    assert tree_of(make.file_bytes(ensemble))["format"] == 2 and tree_of(make.file_bytes(ensemble.member(0)))["format"] == 1
    half = ensemble.astype("float32")
    assert half.dtype == np.float32 and np.allclose(half.log_prob(x, context), ensemble.log_prob(x, context), rtol=1e-4, atol=1e-4)


def tree_of(contents):
    """The JSON of a file."""
    return json.loads(json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])["__metadata__"]["fastmaf"])


def tampered(change):
    contents = make.file_bytes(model("maf"))
    tensors, record = safetensors.numpy.load(contents), tree_of(contents)
    change(record, tensors)
    return safetensors.numpy.save(tensors, {"fastmaf": json.dumps(record)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, t: r.update(flows=[]), "flows must be a list of at least one flow"),
        (lambda r, t: r.update(flows=3), "flows must be a list of at least one flow"),
        (lambda r, t: r["flows"].append(3), "flows.3 is not a JSON object"),
        (lambda r, t: r["flows"].pop(), "no layer has the tensor 'flows.2."),
        (lambda r, t: r["flows"][1].pop("base"), "flows.1 lacks 'base'"),
        (lambda r, t: r["flows"][1].update(format=1), "flows.1 has an unknown field 'format'"),
        (lambda r, t: r["flows"][1].update(names=["a", "b", "c"]), "flows[1] has other names than flows[0]"),
        (lambda r, t: r.update(names=None), "the metadata has an unknown field 'names'"),
        (lambda r, t: r.update(format=3), "it has format 3"),
        (lambda r, t: t.pop("flows.1.layers.0.loc"), "the tensor 'flows.1.layers.0.loc' is missing"),
    ],
)
def test_damaged_files_are_refused(change, message):
    file = tampered(change)
    with pytest.raises(ValueError, match=re.escape(message)):
        fastmaf.load(file)
    if backends.reason("cpu") is None:
        with pytest.raises(ValueError, match=r"flow|tensor|format|metadata"):
            backends.core().File(file)


def test_what_does_not_fit_is_refused():
    flow = fastmaf.MAF(3)
    cases = [
        (lambda: fastmaf.Ensemble([]), "flows is empty"),
        (lambda: fastmaf.Ensemble(3), "flows is 3; it must be a flow or a sequence of flows"),
        (lambda: fastmaf.Ensemble(flow), "members is None; say how many to make of the flow"),
        (lambda: fastmaf.Ensemble(flow, members=0), "members is 0"),
        (lambda: fastmaf.Ensemble([flow], members=2), "members is given beside the members themselves"),
        (lambda: fastmaf.Ensemble([flow], seed=2), "seed is given beside the members themselves"),
        (lambda: fastmaf.Ensemble([flow, 3]), "flows[1]"),
        (lambda: fastmaf.Ensemble([flow, fastmaf.MAF(2)]), "flows[1] has other features than flows[0]"),
        (lambda: fastmaf.Ensemble([flow, fastmaf.MAF(3, 1)]), "flows[1] has other context_features than flows[0]"),
        (lambda: fastmaf.Ensemble([flow, fastmaf.MAF(3, dtype="float64")]), "flows[1] has other dtype than flows[0]"),
        (lambda: fastmaf.Ensemble([flow, fastmaf.MADE(3, "bernoulli")]), "flows[1] has other discrete variables than flows[0]"),
        (
            lambda: fastmaf.Ensemble([fastmaf.MADE(3, "mixed", categories=own) for own in ([3, None, 2], [None, 3, 2])]),
            "flows[1] has other discrete variables than flows[0]",
        ),
        (lambda: model("maf").with_parameters(np.zeros(3)), "parameters has shape (3,)"),
        (lambda: model("maf").member(3), "k is 3"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    with pytest.raises(AttributeError, match=re.escape("an ensemble has no to_noise, since each member has an order and noise of its own")):
        _ = model("maf").to_noise


# Training


def test_members_are_fitted_as_they_would_be_alone(backend):
    ensemble, histories = fitted()
    assert len(histories) == 3 and all(len(history.train) == 3 for history in histories)
    alone, _ = fitted(members=1)
    assert np.array_equal(alone.member(0).parameters(), ensemble.member(0).parameters())
    for k in range(3):
        training = ensemble.member(k).training
        assert training["stopped"] == "max_epochs" and training["epochs"] == 3
        flow = fastmaf.Ensemble(fastmaf.MAF(3, transforms=1, hidden_features=(8,), seed=0), members=3, seed=1).member(k)
        flow.fit(data(), max_epochs=3, seed=training["settings"]["seed"])
        assert np.array_equal(flow.parameters(), ensemble.member(k).parameters())
    assert len({ensemble.member(k).training["settings"]["seed"] for k in range(3)}) == 3


@pytest.mark.usefixtures("core")
def test_no_bit_depends_on_the_threads():
    with fastmaf.num_threads(1):
        one, _ = fitted()
    with fastmaf.num_threads(3):
        three, _ = fitted()
    with fastmaf.num_threads(7):
        seven, _ = fitted()
    assert np.array_equal(one.parameters(), three.parameters()) and np.array_equal(one.parameters(), seven.parameters())


def test_callbacks_are_told_whose_epoch_it_is_and_come_one_at_a_time():
    seen, inside, lock = [], [], threading.Lock()

    def callback(epoch):
        assert lock.acquire(blocking=False), "two at once"
        time.sleep(0.01)
        seen.append((epoch["member"], epoch["epoch"]))
        inside.append(epoch["flow"].features)
        lock.release()
        return epoch["member"] == 1 and epoch["epoch"] == 2

    with fastmaf.num_threads(3) if backends.get_backend() == "cpu" else nullcontext():
        ensemble, histories = fitted(callback=callback)
    assert sorted(seen) == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3)] and set(inside) == {3}
    assert [history.stopped for history in histories] == ["max_epochs", "callback", "max_epochs"]
    assert ensemble.member(1).training["epochs"] == 2


@pytest.mark.parametrize("how", ["raise", "return"])
def test_interrupted_members_keep_their_best(how):
    def callback(epoch):
        if epoch["member"] == 1 and epoch["epoch"] == 2:
            raise KeyboardInterrupt

    ensemble = fastmaf.Ensemble(fastmaf.MAF(3, transforms=1, hidden_features=(8,), seed=0), members=2, seed=1)
    before = ensemble.parameters()
    arguments = {"max_epochs": 100_000, "patience": None, "seed": 5, "callback": callback, "on_interrupt": how}
    if how == "raise":
        with pytest.raises(KeyboardInterrupt):
            ensemble.fit(data(), **arguments)
    else:
        histories = ensemble.fit(data(), **arguments)
        assert histories[1].stopped == "interrupted" and len(histories[1].train) == 2
    assert (ensemble.parameters() != before).any() and ensemble.member(1).training["stopped"] == "interrupted"


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize(("threads", "members", "each", "share"), [(1, 3, 1, 20.0), (2, 3, 1, 30.0), (4, 2, 2, 60.0), (5, 2, 2, 60.0)])
def test_threads_and_time_are_shared(threads, members, each, share, monkeypatch):
    """As many members at once as there are threads, which they divide; those that wait get their share of the time."""
    from fastmaf.train import many

    seen = []

    def fit(flow, *arguments, **options):
        seen.append((fastmaf.get_num_threads(), options["max_seconds"]))
        return fastmaf.History()

    monkeypatch.setattr(many, "fit", fit)
    with fastmaf.num_threads(threads):
        fitted(members=members, max_seconds=60)
    assert seen == [(each, share)] * members


def test_warnings_of_some_members_say_whose_they_are():
    from fastmaf.train.many import _merged

    common, own = ("seen by all", FitWarning), ("seen by some", FitWarning)
    assert _merged([[common, own], [common], [common, own]]) == [common, ("members 0, 2: seen by some", FitWarning)]
    assert _merged([[common], [own]]) == [("member 0: seen by all", FitWarning), ("member 1: seen by some", FitWarning)]


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("times", [1, 4])
def test_ctrl_c_any_number_of_times(times, monkeypatch):
    """All that is asked for is the end; what members have learned is kept, and those that never began are named."""
    from fastmaf.train import many

    begun, left, wait = threading.Event(), [times], many.wait

    def interrupted(futures, **options):
        begun.wait(60)
        if left[0]:
            left[0] -= 1
            raise KeyboardInterrupt
        return wait(futures, **options)

    monkeypatch.setattr(many, "wait", interrupted)
    ensemble = fastmaf.Ensemble(fastmaf.MAF(3, transforms=1, hidden_features=(8,), seed=0), members=5, seed=1)
    options = {"max_epochs": 100_000, "patience": None, "seed": 5, "on_interrupt": "return"}
    with fastmaf.num_threads(1), pytest.warns(FitWarning, match="members 1, 2, 3, 4 of 5 never began to be trained, and spoil the mean"):
        histories = ensemble.fit(data(), callback=lambda epoch: begun.set(), **options)
    assert len(histories) == 5 and {history.stopped for history in histories} == {"interrupted"} and left == [0]
    assert ensemble.member(0).record.fitted and not ensemble.member(4).record.fitted


def test_errors_leave_what_was_learned():
    def callback(epoch):
        if epoch["member"] == 1 and epoch["epoch"] == 2:
            raise LookupError("mine")

    ensemble = fastmaf.Ensemble(fastmaf.MAF(3, transforms=1, hidden_features=(8,), seed=0), members=2, seed=1)
    before = ensemble.parameters()
    with pytest.raises(LookupError, match="mine"):
        ensemble.fit(data(), max_epochs=100_000, patience=None, callback=callback)
    assert (ensemble.parameters() != before).any() and "LookupError" in ensemble.member(1).training["stopped"]
    with pytest.raises(ValueError, match="x has"):
        ensemble.fit(np.full((30, 3), np.nan))
    assert "LookupError" in ensemble.member(1).training["stopped"], "refused data change nothing"


def test_warnings_come_once():
    constant = np.c_[data(), np.repeat([3.0, 4.0], 200)]
    ensemble = fastmaf.Ensemble(fastmaf.MAF(4, transforms=1, hidden_features=(8,), seed=0), members=3, seed=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ensemble.fit(constant, max_epochs=1)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 1 and "few different values" in texts[0] and caught[0].filename == __file__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastmaf.Ensemble([fastmaf.MAF(3, seed=0), fastmaf.MADE(3, seed=0)]).fit(data(), max_epochs=1, lr=1e9)
    assert caught and all(issubclass(warning.category, FitWarning) for warning in caught)


def test_a_reused_array_is_not_shared_between_members():
    buffer = np.empty((400, 3))

    def draw(epoch):
        buffer[...] = data() + 0.1 * epoch
        return buffer

    def fresh(epoch):
        return data() + 0.1 * epoch

    from fastmaf.train.many import _in_turn

    alone = _in_turn(draw, "cpu")
    first, _ = alone(1), alone(2)
    assert np.array_equal(first, fresh(1))
    results = []
    for x in (draw, fresh):
        ensemble = fastmaf.Ensemble(fastmaf.MAF(3, transforms=1, hidden_features=(8,), seed=0), members=3, seed=1)
        ensemble.fit(x, max_epochs=3, seed=5)
        results.append(ensemble.parameters())
    assert np.array_equal(*results)
    with pytest.raises(ValueError, match="cannot be called with one argument"):
        ensemble.fit(lambda: data())


def test_checkpoints_of_members(tmp_path):
    path = tmp_path / "fit.safetensors"
    whole, _ = fitted(max_epochs=4)
    fitted(max_epochs=2, checkpoint=path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"fit.{k}.safetensors" for k in range(3)]
    assert fastmaf.load(tmp_path / "fit.1.safetensors").features == 3
    resumed, histories = fitted(max_epochs=4, checkpoint=path, resume=True)
    assert np.array_equal(resumed.parameters(), whole.parameters()) and all(len(history.train) == 4 for history in histories)
    again = fastmaf.Ensemble(fastmaf.MAF(3, transforms=1, hidden_features=(8,), seed=0), members=3, seed=1)
    again.fit(data(), max_epochs=4, checkpoint=path, resume=True)
    assert np.array_equal(again.parameters(), whole.parameters()), "without a seed that of the checkpoints is taken"
    with pytest.raises(ValueError, match=re.escape("'fit.0.safetensors' exists; pass resume=True")):
        fitted(checkpoint=path)
    before = again.parameters()
    (tmp_path / "fit.0.safetensors").unlink()
    with pytest.raises(ValueError, match=re.escape("'fit.1.safetensors' exists; pass resume=True")):
        again.fit(data(), max_epochs=9, checkpoint=path)
    (tmp_path / "fit.2.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=re.escape("fit.2.safetensors cannot be read as a checkpoint")):
        again.fit(data(), max_epochs=9, checkpoint=path, resume=True)
    assert np.array_equal(again.parameters(), before), "nobody was trained before it was found out"


def test_progress_is_one_bar(capfd):
    fitted(progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "validation" in err and "mean of 3 members" in err and "9epoch" in err.replace(" ", "")
    fitted(progress=False)
    assert capfd.readouterr() == ("", "")


def test_names_of_the_first_frame_are_taken():
    pandas = pytest.importorskip("pandas")
    ensemble = fastmaf.Ensemble(fastmaf.MAF(3, transforms=1, hidden_features=(4,), seed=0), members=2, seed=1)
    frame = pandas.DataFrame(data(), columns=["a", "b", "c"])
    with pytest.raises(ValueError, match="batch_size"):
        ensemble.fit(frame, batch_size=0)
    assert ensemble.names is None
    by_name = copy.deepcopy(ensemble)
    ensemble.fit(frame, max_epochs=1, seed=0)
    by_name.fit(frame, max_epochs=1, seed=0)
    by_name.reset(seed=1)
    by_name.fit(lambda epoch: frame[["b", "c", "a"]], max_epochs=1, seed=0)
    assert np.array_equal(by_name.parameters(), ensemble.parameters()), "frames of a callable go by name too"
    assert ensemble.names == ("a", "b", "c") and ensemble.member(1).names == ("a", "b", "c")
    assert np.array_equal(ensemble.log_prob(frame[["c", "a", "b"]]), ensemble.log_prob(frame))


def test_reset():
    ensemble, _ = fitted()
    ensemble.reset(seed=1)
    new = fastmaf.Ensemble(fastmaf.MAF(3, transforms=1, hidden_features=(8,), seed=0), members=3, seed=1)
    assert np.array_equal(ensemble.parameters(), new.parameters()) and not ensemble.member(0).record.fitted


def test_lines_for_a_logger_say_whose_they_are(caplog):
    with caplog.at_level("INFO", "fastmaf"):
        fitted(members=2)
    assert sorted(message[:16] for message in caplog.messages) == ["member 0, epoch ", "member 1, epoch "]


def test_members_can_be_gone_through():
    ensemble = model("maf")
    assert [flow.parameters().tolist() for flow in ensemble] == [ensemble.member(k).parameters().tolist() for k in range(3)]


def test_help_shows_the_parameters():
    text = inspect.getdoc(fastmaf.Ensemble.fit)
    mine, theirs = (inspect.signature(fit).parameters for fit in (fastmaf.Ensemble.fit, fastmaf.Flow.fit))
    assert list(mine) == list(theirs) and all(mine[name].default == parameter.default for name, parameter in theirs.items())
    for name in mine:
        assert name == "self" or re.search(rf"^{name} : ", text, re.MULTILINE), name
    shared = inspect.signature(fit_members).parameters
    for name, parameter in mine.items():
        assert name not in shared or shared[name].default == parameter.default


def test_words():
    ensemble = model("maf")
    assert (
        repr(ensemble) == "Ensemble(members=3, features=3, dtype=float64): Affine -> 2 x Autoregressive((7, 5), relu, exp_soft) -> Normal"
    )
    assert ensemble.summary().splitlines()[-1].startswith("3 members have ")
    assert ensemble.device == "cpu"


def test_boxes_and_frames():
    ensemble = model("maf")
    inside = ensemble.sample(50, seed=1, within=[(0, None), None, None])
    assert (inside[:, 0] >= 0).all() and 0 < ensemble.acceptance([(0, None), None, None], seed=1) < 1
    pandas = pytest.importorskip("pandas")
    assert isinstance(ensemble.sample(3, as_frame="pandas"), pandas.DataFrame)


def test_evaluation_while_the_ensemble_is_fitted():
    ensemble, _ = fitted()
    x = data(50)
    before, stop, faults = ensemble.log_prob(x), threading.Event(), []
    allowed = [before]

    def read():
        while not stop.is_set():
            values = ensemble.log_prob(x)
            if not any(np.array_equal(values, each) for each in allowed):
                faults.append(values)

    thread = threading.Thread(target=read)
    after = copy.deepcopy(ensemble)
    after.fit(x=data(), max_epochs=2, seed=9)
    allowed.append(after.log_prob(x))
    thread.start()
    ensemble.fit(data(), max_epochs=2, seed=9)
    stop.set()
    thread.join()
    assert not faults and np.array_equal(ensemble.log_prob(x), allowed[1])


def ordered(**options):
    return fastmaf.Ensemble(fastmaf.MADE(4, order=[2, 0, 3, 1], hidden_features=(6,), dtype="float64", **options), members=3, seed=1)


def test_what_comes_first_in_the_order_of_all():
    ensemble = ordered()
    assert ensemble.order == (2, 0, 3, 1)
    x = ensemble.sample(7, seed=1)
    expected = scipy.special.logsumexp([ensemble.member(k).prefix(2).log_prob(x[:, [0, 2]]) for k in range(3)], axis=0) - np.log(3)
    np.testing.assert_allclose(ensemble.prefix(2).log_prob(x[:, [0, 2]]), expected, rtol=1e-12)
    assert not hasattr(model("maf"), "order"), "the layers turn it around"


def test_samples_given_what_only_one_member_expects():
    near, far = (fastmaf.Flow([fastmaf.layers.Affine([shift, shift], [1.0, 1.0])], dtype="float64") for shift in (0.0, 30.0))
    ensemble = fastmaf.Ensemble([near, far])
    given = ensemble.sample_given(np.array([[0.3], [29.0]]), 500, seed=1)
    assert given.shape == (2, 500, 2) and (given[:, :, 0] == [[0.3], [29.0]]).all()
    assert (np.abs(given[0, :, 1]) < 6).all() and (np.abs(given[1, :, 1] - 30) < 6).all()
    assert scipy.stats.kstest(given[1, :, 1] - 30, "norm").pvalue > 1e-4
    beyond = ensemble.sample_given([1e300], 4000, seed=1)[:, 1]
    assert abs((beyond > 15).mean() - 0.5) < 0.05, "neither gives it a density"
    between = ensemble.sample_given([15.0], 4000, seed=1)[:, 1]
    assert abs((between > 15).mean() - 0.5) < 0.05, "both give it the same density"
    weighted = ensemble.sample_given([15.05], 4000, seed=1)[:, 1]
    assert (weighted > 15).mean() == pytest.approx(1 / (1 + math.exp(-0.05 * 30)), abs=0.04)
    assert np.array_equal(ensemble.sample_given([15.05], 4, seed=1)[1:], ensemble.sample_given([15.05], 3, seed=1, offset=1))


@pytest.mark.parametrize("conditional", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("c", [0, 2])
def test_samples_given_values_follow_the_conditional_density(conditional, c):
    ensemble = ordered(conditional=conditional, context_features=c)
    context = np.random.default_rng(0).normal(size=(2, c)) if c else None
    values = np.array([[0.0, 1.0], [1.0, 0.0]])
    samples = ensemble.sample_given(values, 3000, context, seed=2)
    assert (samples[:, :, [0, 2]] == values[:, None]).all()
    assert ensemble.sample_given(values[0], 0, seed=2, context=None if context is None else context[0]).shape == (0, 4)
    whole = ensemble.sample_given(np.tile(np.arange(4.0) % 2, (2, 1)), 2, context, seed=2)
    assert (whole == np.arange(4.0) % 2).all()
    nothing = ensemble.sample_given(np.zeros((2, 0)), 3000, context, seed=2)
    free = ensemble.sample(3000, context, seed=5) if context is not None else ensemble.sample(3000, seed=5)
    assert scipy.stats.ks_2samp(nothing[0, :, 3], np.atleast_3d(free).reshape(-1, 3000, 4)[0, :, 3]).pvalue > 1e-4
    if conditional == "bernoulli":
        for g in range(2):
            rows = np.array([[values[g, 0], b, values[g, 1], a] for a in (0.0, 1.0) for b in (0.0, 1.0)])
            p = np.exp(ensemble.log_prob(rows, None if context is None else context[g]))
            counts = [np.count_nonzero((samples[g] == row).all(axis=1)) for row in rows]
            assert sum(counts) == 3000 and scipy.stats.chisquare(counts, 3000 * p / p.sum()).pvalue > 1e-4
