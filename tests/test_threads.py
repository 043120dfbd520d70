"""The thread pool of the compiled core among Python threads, forks, signals and exits; the environment variables.

The bits are in test_bits.py.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import os
import pickle
import platform
import signal
import subprocess
import sys
import threading
import time

import make
import numpy as np
import pytest

import fastmaf
from fastmaf import backends, config

pytestmark = pytest.mark.skipif(backends.reason("cpu") is not None, reason="the compiled core is absent")
WAIT = 30


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setattr(backends, "active", None)
    fastmaf.set_backend("cpu")
    before = fastmaf.get_num_threads()
    fastmaf.set_num_threads(3)
    yield
    fastmaf.set_num_threads(before)


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


def calls_of(made):
    """Each kind of call, as bytes."""
    context = np.array([0.5, -0.5])
    x = made.sample(700, context, seed=1)
    calls = (
        lambda: [made.sample(700, context, seed=1)],
        lambda: [made.log_prob(x, context)],
        lambda: [made.log_prob(x[:1], context)],
        lambda: [made.from_noise(x, context)],
        lambda: made.vjp(x, context, x[:, 0]),
    )
    return [lambda call=call: b"".join(array.tobytes() for array in call()) for call in calls]


def test_settings_change_while_others_compute():
    """A call keeps the instruction set and the number of threads that it began with."""
    calls, before = calls_of(flow()), config.get_isa()
    allowed = [set() for _ in calls]
    for isa in config.available_isas():
        fastmaf.set_isa(isa)
        for call, results in zip(calls, allowed, strict=True):
            results.add(call())
    done = threading.Event()

    def change():
        while not done.is_set():
            for isa in config.available_isas():
                fastmaf.set_isa(isa)
                fastmaf.set_num_threads(1 + len(isa) % 4)

    def compute(_):
        return all(call() in results for _ in range(40) for call, results in zip(calls, allowed, strict=True))

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as executor:
            assert all(executor.map(compute, range(4)))
    finally:
        done.set()
        changing.join()
        fastmaf.set_isa(before)


def test_a_number_of_threads_is_that_of_its_own_thread():
    inside, meet = [], threading.Barrier(2)

    def worker(n):
        for _ in range(3):
            with fastmaf.num_threads(n):
                meet.wait(WAIT)
                inside.append((n, fastmaf.get_num_threads()))
                with pytest.raises(ZeroDivisionError), fastmaf.num_threads(n + 10):
                    inside.append((n + 10, fastmaf.get_num_threads()))
                    raise ZeroDivisionError
                inside.append((n, fastmaf.get_num_threads()))
                meet.wait(WAIT)
            inside.append((3, fastmaf.get_num_threads()))
            meet.wait(WAIT)

    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        list(executor.map(worker, (5, 7)))
    assert len(inside) == 24 and all(wanted == got for wanted, got in inside)
    assert fastmaf.get_num_threads() == 3


def test_a_number_of_threads_for_the_process_holds_behind_a_block():
    with fastmaf.num_threads(5):
        fastmaf.set_num_threads(2)
        assert fastmaf.get_num_threads() == 5
    assert fastmaf.get_num_threads() == 2


def test_a_number_of_threads_is_that_of_its_own_task():
    async def task(n, begin, end):
        await asyncio.sleep(begin / 100)
        with fastmaf.num_threads(n):
            await asyncio.sleep(end / 100)
            return fastmaf.get_num_threads(), await asyncio.to_thread(fastmaf.get_num_threads)

    async def both():  # the first one leaves its block while the second is in its own
        return await asyncio.gather(task(5, 0, 2), task(7, 1, 3))

    assert asyncio.run(both()) == [(5, 5), (7, 7)]
    assert fastmaf.get_num_threads() == 3


FLOATS = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes([0x0F, 0xAE, 0x17, 0xC3, 0x0F, 0xAE, 0x1F, 0xC3]))  # ldmxcsr [rdi], ret; stmxcsr [rdi], ret
code = ctypes.addressof(ctypes.c_char.from_buffer(page))
control = ctypes.c_uint32(0x1F80)
load, store = (ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code + at) for at in (0, 4))
flow = fastmaf.MAF(3, transforms=2, hidden_features=(20, 20), dtype="float32", seed=1)
x = flow.sample(5000, seed=0)
g = (1e-40 * x[:, 0]).astype("float32")  # no normal number
bounded = fastmaf.MAF(2, bounds=[(0, 1), (None, 3)], seed=1).astype("float64")  # next to 0 there is no normal number either
def results(pack):
    own = flow.astype("float64").astype("float32") if pack else flow
    arrays = [own.log_prob(x), own.log_prob(x[:1]), own.sample(3000, seed=2), *own.vjp(x, None, g)]
    inner = bounded.astype("float32").astype("float64") if pack else bounded
    arrays += [inner.sample(300, seed=2), inner.log_prob([[5e-324, 2.0], [0.5, -1.0]])]
    return b"".join(array.tobytes() for array in arrays if array is not None)
def with_control(word, pack):
    control.value = word
    load(ctypes.byref(control))
    try:
        got = results(pack)
        control.value = 0
        store(ctypes.byref(control))
        return got, control.value & ~0x3F
    finally:
        control.value = 0x1F80
        load(ctypes.byref(control))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the control word is that of x86")
@pytest.mark.parametrize("threads", ["1", "3"])
@pytest.mark.parametrize("word", ["0x9FC0", "0x5F80"], ids=["flush to zero", "round up"])
def test_bits_do_not_depend_on_the_floats_of_the_caller(threads, word):
    """Neither on those of its thread now nor when the pool began; the caller keeps its own."""
    code = FLOATS + f"got = [with_control({word}, pack) for pack in (False, True)]\n"
    code += f"expected = results(True)\nprint([same == expected and word == {word} for same, word in got])"
    assert output(code, FASTMAF_NUM_THREADS=threads) == "[True, True]"


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
def test_fork_while_another_thread_packs():
    """The child does not wait for a thread that it does not have."""
    for delay in np.linspace(0, 0.03, 12):
        made = fastmaf.MAF(200, transforms=3, hidden_features=(300, 300), seed=1)
        other = threading.Thread(target=lambda made=made: made.log_prob(np.zeros((1, 200))))
        other.start()
        time.sleep(delay)
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            os._exit(0 if np.isfinite(made.log_prob(np.zeros((1, 200)))).all() else 1)
        assert os.waitpid(child, 0)[1] == 0
        other.join()


FORK_IN_A_HANDLER = """
import os, signal, threading
flow = fastmaf.MAF(20, transforms=5, hidden_features=(256, 256), seed=1)
flow.sample(1000, seed=0)
signal.signal(signal.SIGUSR1, lambda *_: children.append(os.fork()))
children = []
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
try:
    x = flow.sample(400_000, seed=1)
except RuntimeError as error:
    os._exit(7 if "forked in the middle of a call" in str(error) else 1)
print(os.waitpid(children[0], 0)[1] >> 8, np.isfinite(x).all())
"""


def test_a_fork_in_the_middle_of_a_call():
    """In a signal handler: the parent goes on, and the child, which has no pool for the rest, is told."""
    assert output("import warnings; warnings.simplefilter('ignore')\n" + FORK_IN_A_HANDLER, FASTMAF_NUM_THREADS="2") == "7 True"


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


@pytest.mark.parametrize("isa", config.available_isas() if backends.reason("cpu") is None else [])
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


LATE = """
class Late:
    def __del__(self):
        self.flow.log_prob(self.x), self.flow.sample(50_000)
late = Late()
late.flow, late.x = fastmaf.MAF(8, hidden_features=(300, 300)), np.zeros((50_000, 8))
late.flow.log_prob(late.x)
import sys
sys.modules["kept"] = late  # until the interpreter goes down
print("over")
"""


def test_the_interpreter_may_go_down_with_flows_that_are_used_to_the_end():
    assert output(LATE) == "over"
