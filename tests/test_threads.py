"""The thread pool of the compiled core among Python threads, forks, signals and exits; the environment variables.

The bits are in test_bits.py.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import make
import numpy as np
import pytest

import fastmaf
from fastmaf import _backends, config

pytestmark = pytest.mark.skipif(_backends.reason("cpu") is not None, reason="the compiled core is absent")
WAIT = 30


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setattr(_backends, "active", None)
    fastmaf.set_backend("cpu")
    with fastmaf.num_threads(3):
        yield


def flow(dtype="float32"):
    return make.case("6 (3, 3) 2", dtype).flow


def work(made):
    """One call of every kind, on enough rows for all threads; as bytes."""
    context = np.array([0.5, -0.5])
    x = made.sample(700, context, seed=1)
    arrays = [x, made.log_prob(x, context), made.from_noise(x, context), *made.vjp(x, context, x[:, 0])]
    return b"".join(array.tobytes() for array in arrays)


def run(code, **environment):
    """A Python process of its own."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("FASTMAF_", "OMP_"))}
    command = [sys.executable, "-c", "import numpy as np, fastmaf\nfrom fastmaf import config\n" + code]
    return subprocess.run(command, env=variables | environment, capture_output=True, text=True, timeout=WAIT)


def output(code, **environment):
    result = run(code, **environment)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout.strip()


def test_eight_threads_at_once():
    made = flow()
    expected, barrier = work(made), threading.Barrier(8)

    def worker(k):
        own = made if k % 2 else pickle.loads(pickle.dumps(made))  # packs while others compute
        barrier.wait(WAIT)
        return [work(own) == expected for _ in range(10)]

    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        assert all(all(same) for same in executor.map(worker, range(8)))


def test_eight_threads_pack_a_flow_once():
    barrier, made = threading.Barrier(8), make.flow(5, (40, 40), dtype="float32")

    def worker(_):
        barrier.wait(WAIT)
        return made.sample(100, seed=1).tobytes()

    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        assert len(set(executor.map(worker, range(8)))) == 1


def test_other_python_threads_run_meanwhile():
    """The interpreter lock is released."""
    made = make.case("13 (49, 50) 3", "float32").flow
    done, counts = threading.Event(), []

    def count():
        k = 0
        while not done.is_set():
            k += 1
            time.sleep(0.001)
        counts.append(k)

    counter = threading.Thread(target=count)
    counter.start()
    with fastmaf.num_threads(1):
        start = time.perf_counter()
        made.sample(200_000, np.zeros(3), seed=1)
        elapsed = time.perf_counter() - start
    done.set()
    counter.join()
    assert counts[0] > 100 * elapsed


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_after_a_call():
    made = flow()
    expected = work(made)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(WAIT)
        try:
            os.write(write, b"same" if work(made) == expected else b"other")
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"same"
    assert os.waitpid(child, 0)[1] == 0
    assert work(made) == expected


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_during_a_call():
    """The child has a pool of its own, whatever the parent's is doing."""
    made, done = flow(), threading.Event()
    expected = work(made)
    busy = threading.Thread(target=lambda: [work(made) for _ in iter(done.is_set, True)])
    busy.start()
    try:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map_async(work, [made] * 6).get(WAIT) == [expected] * 6
    finally:
        done.set()
        busy.join()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes(method):
    made, context = flow(), np.array([0.5, -0.5])
    expected = made.sample(50, context, seed=1)
    with multiprocessing.get_context(method).Pool(2) as pool:
        for drawn in pool.starmap_async(made.sample, [(50, context, 1)] * 3).get(WAIT):
            assert np.array_equal(drawn, expected)


LONG = """
SOON = 3
import _thread, signal, threading, time
flow = fastmaf.MAF(20, transforms=5, hidden_features=(256, 256))
x = flow.sample(1000, seed=0)
x = np.broadcast_to(x, (4000, 1000, 20))
calls = {
    "log_prob": lambda: flow.log_prob(x),
    "sample": lambda: flow.sample(4_000_000, seed=1),
    "to_noise": lambda: flow.to_noise(x),
    "from_noise": lambda: flow.from_noise(x),
    "gradient": lambda: flow.log_prob_and_grad(x),
}
threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT)).start()
start = time.perf_counter()
try:
    calls[%r]()
except KeyboardInterrupt:
    print(time.perf_counter() - start < SOON, flow.log_prob(x[0, :5]).shape, np.array_equal(flow.sample(1000, seed=0), x[0]))
"""


@pytest.mark.parametrize("operation", ["log_prob", "sample", "to_noise", "from_noise", "gradient"])
@pytest.mark.parametrize("threads", ["1", "2"])
def test_interrupt(operation, threads):
    """A signal ends a long call soon; the flow and the pool live on."""
    assert output(LONG % operation, FASTMAF_NUM_THREADS=threads) == "True (5,) True"


def test_exit_with_the_pool_alive():
    code = "flow = fastmaf.MAF(4)\nx = flow.sample(10_000, seed=0)\nprint(x.shape, config.get_num_threads())"
    assert output(code, FASTMAF_NUM_THREADS="5") == "(10000, 4) 5"


DAEMONS = """
import threading, time
flow = fastmaf.MAF(6, hidden_features=(64, 64))
x = flow.sample(3000, seed=0)
rows = np.broadcast_to(x, (1000, 3000, 6))
def fit():
    fastmaf.MAF(6).fit(np.concatenate([x] * 20), max_epochs=10**6, callback=lambda *_: None)
def forever(call):
    while True: call()
for call in %s: threading.Thread(target=forever, args=(call,), daemon=True).start()
time.sleep(0.4)
print("over")
"""


@pytest.mark.parametrize(
    "calls", ["[lambda: flow.log_prob(x)] * 3", "[lambda: flow.sample(10**7)]", "[lambda: flow.log_prob_and_grad(rows), fit]"]
)
def test_exit_with_daemons_in_calls(calls):
    """Short ones, which ask for the interpreter's lock while it goes down, and long ones, which ask for signals."""
    assert output(DAEMONS % calls, FASTMAF_NUM_THREADS="2") == "over"


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"FASTMAF_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4"}, 4),
        ({"FASTMAF_NUM_THREADS": "3", "OMP_NUM_THREADS": "4"}, 3),
        ({"FASTMAF_NUM_THREADS": "0", "OMP_NUM_THREADS": "5,2"}, 5),
    ],
)
def test_number_of_threads_from_the_environment(environment, threads):
    assert output("print(config.get_num_threads())", **environment) == str(threads)


def test_number_of_threads():
    cores = len(os.sched_getaffinity(0))
    assert 1 <= int(output("print(config.get_num_threads())")) <= cores
    assert fastmaf.config.get_num_threads() == 3
    with fastmaf.num_threads(200):
        assert work(flow()) == work(flow())
    for n in (0, -1, 1.5, "2"):
        with pytest.raises(ValueError, match="n is"):
            fastmaf.set_num_threads(n)


@pytest.mark.parametrize("isa", config.available_isas() if _backends.reason("cpu") is None else [])
def test_instruction_set_from_the_environment(isa):
    code = "print(config.get_isa(), fastmaf.MAF(3).log_prob(np.zeros((2, 3))).shape)"
    assert output(code, FASTMAF_ISA=isa) == f"{isa} (2,)"


def test_an_unknown_instruction_set_is_an_error():
    """At the first call, and at every other."""
    code = "for _ in range(2):\n    try: fastmaf.MAF(3).%s\n    except ValueError as error: print(error)"
    for call in ("log_prob(np.zeros((2, 3)))", "sample(100)", "log_prob_and_grad(np.zeros((200, 3)))"):
        lines = output(code % call, FASTMAF_ISA="sse9").splitlines()
        assert len(lines) == 2 and lines[0] == lines[1]
        assert lines[0].startswith("this CPU has no instruction set 'sse9'; it has ") and "baseline" in lines[0]
    assert "sse9" in output("print(fastmaf.show_config())", FASTMAF_ISA="sse9")
    with pytest.raises(ValueError, match="isa is 'sse9'; this machine and this build have 'avx|'baseline"):
        fastmaf.set_isa("sse9")
