"""The CPU kernel against float64: blocks and tiles, rounding, threads."""

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
    bool(cpu.unavailable_reason), reason=cpu.unavailable_reason or "it is available"
)
both_statistics = pytest.mark.parametrize("statistics", STATISTICS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_layouts = pytest.mark.parametrize(
    "channels_last", [False, True], ids=["contiguous", "channels_last"]
)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Make torch fill new memory with NaN, so that unwritten elements show."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_empty_like_is_filled_with_nan() -> None:
    assert torch.empty_like(torch.ones(3)).isnan().all()


# N, C, M around every limit of the kernel. All layouts: 16 lanes, blocks of 64 channels.
# Contiguous: groups of 4 runs, channels of up to 1024 positions that share a block, tiles of 4096
# elements. Channels-last: tiles of 256 positions.
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
def test_forward_and_backward_at_every_block_and_tile_limit(
    shape: tuple[int, ...], channels_last: bool, statistics: str, dtype: torch.dtype
) -> None:
    x = lay_out(normal(*shape), channels_last).to(dtype)
    check(cpu, x, normal(*shape, seed=1).to(dtype), 1e-4, statistics)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_statistics
def test_forward_and_backward_on_rows_of_every_length(statistics: str, dtype: torch.dtype) -> None:
    # Rows are processed in vectors of up to 16 elements, so that the ends of rows fall on every
    # position of a vector; 21 or 7 rows do not fill groups of 4, 8 or 16 rows.
    x, grad_output = normal(3, 7, 300).to(dtype), normal(3, 7, 300, seed=1).to(dtype)
    for length in range(1, 301):
        samples = 3 if length < 50 else 1
        rows = x[:samples, :, :length].contiguous()
        check(cpu, rows, grad_output[:samples, :, :length], 1e-4, statistics)


@both_statistics
def test_forward_and_backward_with_every_number_of_channels(statistics: str) -> None:
    # Channels-last lines are processed in vectors too; blocks hold 64 channels.
    for channels in range(1, 131):
        dtype = DTYPES[channels % 4]
        x = lay_out(normal(1, channels, 5), True).to(dtype)
        check(cpu, x, normal(1, channels, 5, seed=1).to(dtype), 1e-4, statistics)


@both_layouts
@both_statistics
def test_forward_and_backward_write_nothing_outside_the_map(
    channels_last: bool, statistics: str
) -> None:
    library, pointer = cpu._library, ctypes.c_void_p
    for samples, channels, positions in [(2, 3, 1), (1, 5, 9), (3, 7, 49), (2, 65, 3), (1, 1, 30)]:
        for code, dtype in enumerate(DTYPES):
            count = samples * channels * positions
            x, grad_output = normal(2, count + 32).to(dtype)
            out, dx = torch.full((2, count + 32), 7, dtype=dtype)
            sizes = (samples, channels, positions, 0.1, code, channels_last)
            options = (*sizes, statistics == "leave_one_out", None, 1)
            data = [pointer(each[16:].data_ptr()) for each in (grad_output, x, out, dx)]
            assert library.simam_forward(data[1], data[2], *options) == 0
            assert library.simam_backward(data[0], data[1], data[3], *options) == 0
            for result in (out, dx):
                assert torch.equal(result[:16], torch.full_like(result[:16], 7))
                assert torch.equal(result[16 + count :], torch.full_like(result[:16], 7))


@pytest.mark.parametrize("length", [2, 3, 4, 7, 9, 15, 16, 17, 25, 49, 196])
@both_statistics
def test_forward_and_backward_keep_nan_at_the_ends_of_a_row_in_the_row(
    length: int, statistics: str
) -> None:
    for dtype, index in itertools.product((torch.float32, torch.bfloat16), (0, -1)):
        x, grad_output = normal(3, 5, length).to(dtype), normal(3, 5, length, seed=1).to(dtype)
        clean = both_passes(x, grad_output, statistics)
        for sample, channel in [(0, 0), (1, 2), (2, 4)]:
            broken = x.clone()
            broken[sample, channel, index] = math.nan
            dirty = both_passes(broken, grad_output, statistics)
            for before, after in zip(clean, dirty, strict=True):
                assert after[sample, channel].isnan().all()
                after[sample, channel] = before[sample, channel]
                assert torch.equal(before, after)


@both_layouts
@both_statistics
def test_forward_and_backward_are_bitwise_equal_for_any_number_of_threads(
    channels_last: bool, statistics: str
) -> None:
    # With fewer blocks than threads, the loop over tiles is parallel; else the loop over blocks.
    before = torch.get_num_threads()
    try:
        for shape in [(1, 1, 30000), (1, 3, 9999), (5, 7, 1500), (1, 100, 2000), (3, 650, 300)]:
            for dtype in (torch.float32, torch.bfloat16):
                x = lay_out(normal(*shape), channels_last).to(dtype)
                grad_output = lay_out(normal(*shape, seed=1), channels_last).to(dtype)
                results = []
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    results.append(both_passes(x, grad_output, statistics))
                for output, gradient in results[1:]:
                    assert torch.equal(output, results[0][0])
                    assert torch.equal(gradient, results[0][1])
    finally:
        torch.set_num_threads(before)


RANGE = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
PARALLEL_FOR = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, RANGE, ctypes.c_void_p
)


# Two blocks are fewer than four threads. So each of the 2 + 3 stages has a parallel loop over the
# tiles, of 4096 elements or 256 positions. With four blocks, each pass has one loop over blocks.
@pytest.mark.parametrize(
    ("shape", "channels_last", "expected"),
    [
        ((1, 2, 40_000), False, [2 * 10] * 5),
        ((2, 2, 40_000), True, [2 * 157] * 5),
        ((2, 2, 40_000), False, [4, 4]),
        ((4, 2, 40_000), True, [4, 4]),
    ],
)
def test_forward_and_backward_loop_over_tiles_if_blocks_are_few(
    shape: tuple[int, ...],
    channels_last: bool,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = []

    def parallel_for(begin: int, end: int, _: int, body: Callable[..., None], context: int) -> int:
        lengths.append(end - begin)
        for index in reversed(range(begin, end)):  # threads take indices in any order
            body(index, index + 1, context)
        return 0

    function = PARALLEL_FOR(parallel_for)
    monkeypatch.setattr(cpu, "_parallel_for", ctypes.cast(function, ctypes.c_void_p).value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    x = lay_out(normal(*shape), channels_last).float()
    check(cpu, x, normal(*shape, seed=1).float(), 0.1, "shared")
    assert lengths == expected


@both_layouts
@pytest.mark.parametrize("mean", [100.0, -100.0, 1e4])
def test_forward_is_accurate_far_from_zero(channels_last: bool, mean: float) -> None:
    # A float32 mean of 100 is rounded in the fifth decimal, which the deviations would inherit.
    x = lay_out(normal(1, 2, 512 * 512) + mean, channels_last).float()
    expected = reference.forward(x.double(), 1e-4, "shared")
    relative = (F.simam(x, 1e-4).double() - expected) / expected
    assert relative.abs().max() < 1e-6


@both_layouts
@both_statistics
@pytest.mark.parametrize("std", [1e-3, 1.0, 1e3])
def test_forward_gate_is_accurate_to_2e_7(channels_last: bool, statistics: str, std: float) -> None:
    for shape in [(4, 64, 49), (2, 64, 784), (1, 64, 3136)]:
        x = lay_out(std * normal(*shape), channels_last).float()
        gate = reference.attention(x.double(), 1e-4, statistics)
        actual = cpu.forward(x, 1e-4, statistics).double() / x.double()
        # The kernel rounds the product of x and the gate, so the quotient has this error too.
        product_rounding = torch.finfo(torch.float32).eps / 2
        assert (actual - gate).abs().max() < 2e-7 + product_rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_forward_converts_every_half_precision_number(dtype: torch.dtype) -> None:
    # Maps of one position: the output is x sigmoid(1/2), computed in float32 and rounded once.
    x = torch.arange(2**16).to(torch.uint16).view(dtype).reshape(64, 1024, 1)
    gate = torch.sigmoid(torch.tensor(0.5, dtype=torch.float64)).float()
    expected = (x.float() * gate).to(dtype)
    actual = cpu.forward(x, 1e-4, "shared")
    finite = torch.isfinite(x)
    # The kernel's gate may differ in the last float32 digit, which changes how a few outputs round.
    distance = rank(actual[finite]) - rank(expected[finite])
    assert distance.abs().max() <= 1
    assert (distance != 0).float().mean() < 1e-3
    # The deviation of an infinite neuron from its own mean is NaN.
    assert actual[~finite].isnan().all()


@both_layouts
@both_statistics
@every_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_forward_and_backward_keep_nan_and_infinity_in_their_channel(
    channels_last: bool, statistics: str, dtype: torch.dtype, value: float
) -> None:
    for shape in [(3, 5, 30), (3, 70, 300), (2, 2, 5000)]:
        x, grad_output = normal(*shape).to(dtype), normal(*shape, seed=1).to(dtype)
        clean = both_passes(lay_out(x, channels_last), grad_output, statistics)
        x[1, 1, 7] = value
        dirty = both_passes(lay_out(x, channels_last), grad_output, statistics)
        for before, after in zip(clean, dirty, strict=True):
            assert after[1, 1].isnan().all()
            after[1, 1] = before[1, 1]
            assert torch.equal(before, after)


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F81, 0x7FFF, 0xFFC0, 0xFF81, 0xFFFF])
def test_forward_keeps_every_bfloat16_nan(bits: int) -> None:
    x = torch.ones(1, 1, 40, dtype=torch.bfloat16)
    x.view(torch.uint16)[0, 0, 3] = bits
    assert cpu.forward(x, 0.1, "shared").isnan().all()


def test_forward_accepts_lambda_below_float32_range() -> None:
    x = torch.zeros(1, 2, 5)
    assert torch.equal(cpu.forward(x, 1e-300, "shared"), x)


@both_layouts
def test_forward_opens_the_gate_where_the_energy_underflows(channels_last: bool) -> None:
    # The other neurons are equal, so their variance is lambda, and float32 cannot hold 1 / e*.
    x = torch.zeros(1, 3, 40)
    x[0, 1, 5] = 1e10
    actual = cpu.forward(lay_out(x, channels_last), 1e-30, "leave_one_out")
    assert torch.equal(actual, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_backward_accepts_the_smallest_lambda(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 2, 5, dtype=dtype)
    gradient = cpu.backward(torch.ones_like(x), x, math.ulp(0.0), "shared")
    torch.testing.assert_close(gradient, torch.sigmoid(torch.full_like(x, 0.5)))


def test_forward_and_backward_read_nothing_outside_the_map() -> None:
    for shape, channels_last in itertools.product(
        [(2, 3, 50), (1, 70, 9), (1, 1, 5000)], [False, True]
    ):
        count = math.prod(shape)
        memory = torch.full((count + 128,), math.nan)
        values = memory[64 : 64 + count]
        values[:] = normal(*shape).flatten().float()
        if channels_last:
            x = values.reshape(shape[0], shape[2], shape[1]).movedim(2, 1)
        else:
            x = values.reshape(shape)
        for result in both_passes(x, x, "shared"):
            assert not result.isnan().any()


def test_import_keeps_subnormal_numbers() -> None:
    # A shared library linked with -ffast-math sets flush-to-zero for the whole process.
    program = (
        "import torch; tiny = torch.tensor([1e-310], dtype=torch.float64); import simam;"
        "simam.SimAM()(torch.randn(1, 2, 8)); print((tiny * 1).item() > 0, (tiny / 2).item() > 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


def put_sum(queue: "multiprocessing.SimpleQueue[float]", x: Tensor) -> None:
    torch.set_num_threads(1)
    queue.put(cpu.forward(x, 0.1, "shared").double().sum().item())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
# Python warns when a process with threads forks, which this test does on purpose.
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_forward_runs_in_a_forked_process_after_a_parallel_region() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = normal(4, 64, 56 * 56).float()
        expected = cpu.forward(x, 0.1, "shared").double().sum().item()
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=put_sum, args=(queue, x))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert queue.get() == pytest.approx(expected)
    finally:
        torch.set_num_threads(before)


def test_backward_runs_in_two_python_threads_at_once() -> None:
    xs = [normal(4, 64, 784, seed=seed).float() for seed in range(2)]
    expected = [cpu.backward(x, x, 0.1, "leave_one_out") for x in xs]
    equal = []

    def work(index: int) -> None:
        for _ in range(50):
            actual = cpu.backward(xs[index], xs[index], 0.1, "leave_one_out")
            equal.append(torch.equal(actual, expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 100


def test_kernels_info_lists_every_device_and_dtype() -> None:
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


def test_forward_reports_failure_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfMemory:
        def simam_forward(self, *args: object) -> int:
            return 1

    monkeypatch.setattr(cpu, "_library", OutOfMemory())
    with pytest.raises(RuntimeError, match=r"^the CPU kernel of simam failed: out of memory$"):
        F.simam(torch.ones(1, 2, 3))


@pytest.mark.sweep
def test_forward_and_backward_on_ten_thousand_random_cases() -> None:
    draw = random.Random(0)
    worst = dict.fromkeys(itertools.product(DTYPES, ("forward", "backward")), 0.0)
    for seed in range(10_000):
        dims = draw.choice([3, 4, 5])
        max_size = {3: 3000, 4: 60, 5: 12}[dims]
        sizes = [draw.randint(1, max_size) for _ in range(dims - 2)]
        shape = (draw.randint(1, 3), draw.choice([1, 2, 3, 16, 17, 64, 65, 100]), *sizes)
        if math.prod(shape) > 200_000:
            shape = (1, min(shape[1], 8), *sizes)
        dtype = draw.choice(DTYPES)
        std, offset = 10 ** draw.uniform(-3, 3), draw.choice([0.0, 1.0, -30.0])
        e_lambda, statistics = 10 ** draw.uniform(-8, 1), draw.choice(STATISTICS)
        x = (std * (normal(*shape, seed=seed).clamp(-5, 5) + offset)).to(dtype)
        order = draw.sample(range(dims), dims)
        if draw.random() < 0.5:
            x = x.permute(order).contiguous().permute([order.index(i) for i in range(dims)])
        if draw.random() < 0.3:
            x = x.repeat_interleave(2, -1)[..., ::2]
        grad_output = normal(*shape, seed=seed + 1).to(dtype)
        errors = check(cpu, x, grad_output, e_lambda, statistics)
        for name, error in zip(("forward", "backward"), errors, strict=True):
            worst[dtype, name] = max(worst[dtype, name], error)
    for (dtype, name), error in worst.items():
        print(f"{dtype} {name}: {error:.2f} of the allowed error")  # noqa: T201 - shown by pytest -s


def both_passes(x: Tensor, grad_output: Tensor, statistics: str) -> tuple[Tensor, Tensor]:
    """Return the output and the gradient with respect to x."""
    return cpu.forward(x, 0.1, statistics), cpu.backward(grad_output, x, 0.1, statistics)


def rank(x: Tensor) -> Tensor:
    """Return the position of each half-precision number among all, from zero."""
    magnitude = x.abs().view(torch.int16).int()
    return torch.where(x < 0, -magnitude, magnitude)
