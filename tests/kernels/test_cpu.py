"""The CPU kernel against float64: its tiles and blocks, its roundings, its threads."""

import ctypes
import itertools
import math
import multiprocessing
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import simam
from simam import functional as F
from simam import reference
from simam.kernels import cpu, gpu
from tests.helpers.kernel_checks import check, lay_out, normal

STATISTICS = ("shared", "leave_one_out")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(
    bool(cpu.unavailable_reason), reason=cpu.unavailable_reason or "it is there"
)
both_statistics = pytest.mark.parametrize("statistics", STATISTICS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_layouts = pytest.mark.parametrize("strips", [False, True], ids=["rows", "strips"])


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Deterministic, torch allocates outputs as NaN, so that an element left out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_outputs_are_poisoned() -> None:
    assert torch.empty_like(torch.ones(3)).isnan().all()


# N, C, M around every limit of the kernel: 16 lanes, runs of 4, tiles of 64 rows, rows that
# share a tile up to 1024, blocks of 4096; strips of 64 channels, blocks of 256 lines.
SHAPES = [
    (1, 1, 1),
    (2, 3, 1),
    (1, 1, 2),
    (1, 1, 3),
    (3, 1, 5),
    (1, 5, 15),
    (1, 5, 17),
    (2, 65, 49),
    (3, 43, 63),
    (1, 21, 196),
    (1, 5, 1023),
    (1, 5, 1024),
    (1, 2, 1025),
    (1, 2, 4095),
    (1, 2, 4096),
    (1, 2, 4097),
    (1, 1, 4099),
    (2, 2, 6272),
    (1, 3, 7200),
    (1, 1, 20000),
    (1, 63, 255),
    (2, 64, 256),
    (1, 65, 257),
    (2, 129, 127),
    (1, 127, 27),
    (1, 128, 28),
    (2, 593, 55),
    (1, 1200, 14),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@both_layouts
@both_statistics
@every_dtype
def test_every_tile_and_block(
    shape: tuple[int, ...], strips: bool, statistics: str, dtype: torch.dtype
) -> None:
    x = lay_out(normal(*shape), strips).to(dtype)
    check(cpu, x, normal(*shape, seed=1).to(dtype), 1e-4, statistics)


@both_layouts
@both_statistics
def test_threads_change_no_bit(strips: bool, statistics: str) -> None:
    # Fewer tiles than threads share out their blocks; more, the tiles.
    before = torch.get_num_threads()
    try:
        for shape in [(1, 1, 30000), (1, 3, 9999), (5, 7, 1500), (1, 100, 2000), (3, 650, 300)]:
            for dtype in (torch.float32, torch.bfloat16):
                x = lay_out(normal(*shape), strips).to(dtype)
                pull = lay_out(normal(*shape, seed=1), strips).to(dtype)
                results = []
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    forward = cpu.forward(x, 0.1, statistics)
                    results.append((forward, cpu.backward(pull, x, 0.1, statistics)))
                for forward, backward in results[1:]:
                    assert torch.equal(forward, results[0][0])
                    assert torch.equal(backward, results[0][1])
    finally:
        torch.set_num_threads(before)


RANGE = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
LOOP = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, RANGE, ctypes.c_void_p
)


# Two tiles of rows or of strips are fewer than four threads, so their blocks, of 4096 elements or
# 256 lines, are shared out in each of 2 + 3 stages; else the tiles are, all stages at once.
@pytest.mark.parametrize(
    ("shape", "strips", "expected"),
    [
        ((1, 2, 40_000), False, [2 * 10] * 5),
        ((2, 2, 40_000), True, [2 * 157] * 5),
        ((2, 2, 40_000), False, [4, 4]),
        ((4, 2, 40_000), True, [4, 4]),
    ],
)
def test_what_threads_share_out(
    shape: tuple[int, ...], strips: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = []

    def loop(begin: int, end: int, grain: int, run: Callable[..., None], context: int) -> int:
        shared.append(end - begin)
        for index in reversed(range(begin, end)):  # in any order
            run(index, index + 1, context)
        return 0

    lent = LOOP(loop)
    monkeypatch.setattr(cpu, "_parallel_for", ctypes.cast(lent, ctypes.c_void_p).value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    x = lay_out(normal(*shape), strips).float()
    check(cpu, x, normal(*shape, seed=1).float(), 0.1, "shared")
    assert shared == expected


@both_layouts
@pytest.mark.parametrize("mean", [100.0, -100.0, 1e4])
def test_large_map_far_from_zero(strips: bool, mean: float) -> None:
    # The digits of a mean of 100 in float32 are those of the deviations' fifth decimal.
    x = lay_out(normal(1, 2, 512 * 512) + mean, strips).float()
    expected = reference.forward(x.double(), 1e-4, "shared")
    relative = (F.simam(x, 1e-4).double() - expected) / expected
    assert relative.abs().max() < 1e-6


@both_layouts
@both_statistics
@pytest.mark.parametrize("std", [1e-3, 1.0, 1e3])
def test_gate_is_exact_to_2e_7(strips: bool, statistics: str, std: float) -> None:
    for shape in [(4, 64, 49), (2, 64, 784), (1, 64, 3136)]:
        x = lay_out(std * normal(*shape), strips).float()
        gate = reference.attention(x.double(), 1e-4, statistics)
        actual = cpu.forward(x, 1e-4, statistics).double() / x.double()
        # The quotient carries the rounding of the product.
        slack = torch.finfo(torch.float32).eps / 2
        assert (actual - gate).abs().max() < 2e-7 + slack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_number_is_read_and_written(dtype: torch.dtype) -> None:
    # Maps of one position: the result is x sigmoid(1/2), rounded once from float32.
    x = torch.arange(2**16).to(torch.uint16).view(dtype).reshape(64, 1024, 1)
    gate = torch.sigmoid(torch.tensor(0.5, dtype=torch.float64)).float()
    expected = (x.float() * gate).to(dtype)
    actual = cpu.forward(x, 1e-4, "shared")
    numbers = torch.isfinite(x)
    # The gate of the kernel may be a float32 step off, which moves the last step of a few.
    distance = steps(actual[numbers]) - steps(expected[numbers])
    assert distance.abs().max() <= 1
    assert (distance != 0).float().mean() < 1e-3
    # An infinite neuron has no finite deviation from itself.
    assert actual[~numbers].isnan().all()


@both_layouts
@both_statistics
@every_dtype
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_stays_in_its_channel(
    strips: bool, statistics: str, dtype: torch.dtype, poison: float
) -> None:
    for shape in [(3, 5, 30), (3, 70, 300), (2, 2, 5000)]:
        x, pull = normal(*shape).to(dtype), normal(*shape, seed=1).to(dtype)
        clean = both(lay_out(x, strips), pull, statistics)
        x[1, 1, 7] = poison
        dirty = both(lay_out(x, strips), pull, statistics)
        for before, after in zip(clean, dirty, strict=True):
            assert after[1, 1].isnan().all()
            after[1, 1] = before[1, 1]
            assert torch.equal(before, after)


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F81, 0x7FFF, 0xFFC0, 0xFF81, 0xFFFF])
def test_every_nan_of_bfloat16_stays_one(bits: int) -> None:
    x = torch.ones(1, 1, 40, dtype=torch.bfloat16)
    x.view(torch.uint16)[0, 0, 3] = bits
    assert cpu.forward(x, 0.1, "shared").isnan().all()


def test_lambda_that_float32_cannot_hold() -> None:
    x = torch.zeros(1, 2, 5)
    assert torch.equal(cpu.forward(x, 1e-300, "shared"), x)


def test_nothing_is_read_or_written_beyond_the_map() -> None:
    for shape, strips in itertools.product([(2, 3, 50), (1, 70, 9), (1, 1, 5000)], [False, True]):
        count = math.prod(shape)
        store = torch.full((count + 128,), math.nan)
        store[64 : 64 + count] = normal(*shape).flatten().float()
        x = store[64 : 64 + count].reshape(shape[0], shape[2], shape[1]).movedim(2, 1)
        x = x if strips else store[64 : 64 + count].reshape(shape)
        assert not cpu.forward(x, 0.1, "shared").isnan().any()
        assert not cpu.backward(x, x, 0.1, "shared").isnan().any()


def test_denormal_numbers_are_kept_after_import() -> None:
    # Flags that allow -ffast-math to a shared library flush them for the whole process.
    program = (
        "import torch; tiny = torch.tensor([1e-310], dtype=torch.float64); import simam;"
        "simam.SimAM()(torch.randn(1, 2, 8)); print((tiny * 1).item() > 0, (tiny / 2).item() > 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


def in_child(queue: "multiprocessing.SimpleQueue[Tensor]", x: Tensor) -> None:
    torch.set_num_threads(1)
    queue.put(cpu.forward(x, 0.1, "shared").sum().item())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
# Python warns that a process with threads forks, which is what is tested.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_fork_after_a_parallel_region() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = normal(4, 64, 56 * 56).float()
        expected = cpu.forward(x, 0.1, "shared").sum().item()
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=in_child, args=(queue, x))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert queue.get() == pytest.approx(expected)
    finally:
        torch.set_num_threads(before)


def test_two_python_threads_at_once() -> None:
    xs = [normal(4, 64, 784, seed=seed).float() for seed in range(2)]
    expected = [cpu.backward(x, x, 0.1, "leave_one_out") for x in xs]
    wrong = []

    def work(index: int) -> None:
        for _ in range(50):
            actual = cpu.backward(xs[index], xs[index], 0.1, "leave_one_out")
            wrong.append(not torch.equal(actual, expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 100
    assert not any(wrong)


def test_kernels_info() -> None:
    info = simam.kernels_info()
    fused = [entry.dtype for entry in info if entry.device == "cpu" and entry.fused]
    assert fused == ["float64", "float32", "bfloat16", "float16"]
    fused = [entry.dtype for entry in info if entry.device == "cuda" and entry.fused]
    assert fused == ([] if gpu.unavailable_reason else ["float32", "bfloat16", "float16"])
    table = str(info).splitlines()
    assert table[0].split() == ["device", "dtype", "kernel"]
    assert re.fullmatch(r"cpu +float32 +fused +\S.*", table[2])
    assert re.fullmatch(r"cuda +float64 +plain torch +no kernel for this dtype", table[5])
    note = (
        re.escape(gpu.unavailable_reason)
        if gpu.unavailable_reason
        else r"Triton \d.*, where compute capability is 8\.0.*"
    )
    assert re.fullmatch(rf"cuda +float16 +(fused|plain torch) +{note}", table[8])
    assert re.fullmatch(r"others +any +plain torch +no kernel for other devices", table[-1])


def test_failure_of_the_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def simam_cpu(self, *args: object) -> int:
            return 1

    monkeypatch.setattr(cpu, "_library", Full())
    with pytest.raises(
        RuntimeError, match=r"^the CPU kernel of simam stopped: it ran out of memory$"
    ):
        F.simam(torch.ones(1, 2, 3))


@pytest.mark.sweep
def test_ten_thousand_random_cases() -> None:
    draw = random.Random(0)
    worst = dict.fromkeys(itertools.product(DTYPES, ("forward", "backward")), 0.0)
    for seed in range(10_000):
        rank = draw.choice([3, 4, 5])
        most = {3: 3000, 4: 60, 5: 12}[rank]
        sizes = [draw.randint(1, most) for _ in range(rank - 2)]
        shape = (draw.randint(1, 3), draw.choice([1, 2, 3, 16, 17, 64, 65, 100]), *sizes)
        if math.prod(shape) > 200_000:
            shape = (1, min(shape[1], 8), *sizes)
        dtype = draw.choice(DTYPES)
        scale, offset = 10 ** draw.uniform(-3, 3), draw.choice([0.0, 1.0, -30.0])
        e_lambda, statistics = 10 ** draw.uniform(-8, 1), draw.choice(STATISTICS)
        x = (scale * (normal(*shape, seed=seed).clamp(-5, 5) + offset)).to(dtype)
        order = draw.sample(range(rank), rank)
        if draw.random() < 0.5:
            x = x.permute(order).contiguous().permute([order.index(i) for i in range(rank)])
        if draw.random() < 0.3:
            x = x.repeat_interleave(2, -1)[..., ::2]
        pull = normal(*shape, seed=seed + 1).to(dtype)
        errors = check(cpu, x, pull, e_lambda, statistics)
        for name, error in zip(("forward", "backward"), errors, strict=True):
            worst[dtype, name] = max(worst[dtype, name], error)
    for (dtype, name), error in worst.items():
        print(f"{dtype} {name}: {error:.2f} of what is allowed")  # noqa: T201 - with pytest -s


def both(x: Tensor, pull: Tensor, statistics: str) -> tuple[Tensor, Tensor]:
    return cpu.forward(x, 0.1, statistics), cpu.backward(pull, x, 0.1, statistics)


def steps(x: Tensor) -> Tensor:
    """The place of a half among the halves."""
    magnitude = x.abs().view(torch.int16).int()
    return torch.where(x < 0, -magnitude, magnitude)
