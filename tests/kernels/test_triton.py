"""The GPU kernels against float64: on a GPU, or by Triton's interpreter on the CPU.

The interpreter must be asked for before Triton is imported, so without a GPU these tests run in a
process of their own: TRITON_INTERPRET=1 python -m pytest tests/test_gpu_kernels.py
"""

import itertools
import math
import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simam import kernels, reference
from simam.kernels import gpu
from simam.kernels.gpu import Plan
from tests.helpers.kernel_checks import check, lay_out, normal

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
STATISTICS = ("shared", "leave_one_out")
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="there is no GPU, and Triton's interpreter is not asked for",
)
# The interpreter computes with numpy, which warns of the NaN and the infinities that are meant.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
both_statistics = pytest.mark.parametrize("statistics", STATISTICS)
both_layouts = pytest.mark.parametrize("strips", [False, True], ids=["rows", "strips"])


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Deterministic, torch allocates memory as NaN, so that an element left out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Tiles that fit, that reach beyond the map, and that take one channel or one position.
PLANS = {
    "whole": lambda whole: Plan(True, 4, whole, 1),
    "whole, narrow": lambda whole: Plan(True, 1, whole, 1),
    "along": lambda _: Plan(False, 4, 8, 1),
    "along, one position": lambda _: Plan(False, 8, 1, 1),
    "two parts": lambda _: Plan(False, 4, 8, 1, steps=2, parts=2),
    "many parts": lambda _: Plan(False, 2, 4, 1, steps=1, parts=7),
}
# N, C, M. Two parts hold at most 32 positions, seven at most 28.
SHAPES = [(2, 3, 1), (2, 5, 7), (1, 4, 16), (1, 9, 17), (1, 3, 27)]


@runs
@pytest.mark.parametrize("plan", PLANS)
@both_layouts
@pytest.mark.parametrize(
    ("dtype", "statistics"),
    [*itertools.product(gpu.DTYPES, ["shared"]), (torch.float32, "leave_one_out")],
)
def test_every_plan(
    plan: str, strips: bool, statistics: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in SHAPES:
        chosen = PLANS[plan](1 << (shape[2] - 1).bit_length())
        # One part takes all steps, and none is without a position: `choose` sees to it.
        steps = -(-shape[2] // chosen.positions)
        parts = min(chosen.parts, -(-steps // chosen.steps))
        chosen = chosen._replace(parts=parts, steps=steps if parts == 1 else chosen.steps)
        monkeypatch.setattr(gpu, "choose", lambda *_, chosen=chosen: chosen)
        compare(shape, strips, statistics, dtype)


@runs
@both_layouts
@both_statistics
@pytest.mark.parametrize(
    "shape",
    [(1, 2, 49), (3, 70, 49), (1, 3, 196), (1, 2, 3136), (1, 1, 7200), (1, 1, 33000), (1, 33, 700)],
    ids=str,
)
def test_the_plan_of_each_size(shape: tuple[int, ...], strips: bool, statistics: str) -> None:
    for dtype in (torch.float32, torch.float16):
        compare(shape, strips, statistics, dtype)


@runs
@both_layouts
@pytest.mark.parametrize("shape", [(1, 2, 49), (1, 1, 3136), (1, 2, 512 * 512)], ids=str)
def test_far_from_zero(shape: tuple[int, ...], strips: bool) -> None:
    # The digits of a mean of 100 in float32 are those of the deviations' fifth decimal.
    x = lay_out(normal(*shape) + 100, strips).float()
    expected = reference.forward(x.double(), 1e-4, "shared")
    actual = gpu.run(x.to(DEVICE), None, 1e-4, "shared").cpu().double()
    assert ((actual - expected) / expected).abs().max() < 1e-6


@runs
@both_layouts
@both_statistics
@pytest.mark.parametrize("std", [1e-3, 1.0, 1e3])
def test_gate_is_exact_to_2e_7(strips: bool, statistics: str, std: float) -> None:
    x = lay_out(std * normal(2, 16, 196), strips).float()
    gate = reference.attention(x.double(), 1e-4, statistics)
    actual = gpu.run(x.to(DEVICE), None, 1e-4, statistics).cpu().double() / x.double()
    # The quotient carries the rounding of the product.
    assert (actual - gate).abs().max() < 2e-7 + torch.finfo(torch.float32).eps / 2


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "one channel": lambda x: x[:, :1].contiguous(),
    "misaligned": lambda x: torch.cat([x.flatten(), x.flatten()[:1]])[1:].reshape(x.shape),
    "one dimension": lambda x: x.flatten(2),
    "three dimensions": lambda x: lay_out(x.unflatten(3, (2, 3)), strips=True),
}


@runs
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    x = LAYOUTS[layout](normal(2, 3, 4, 6)).float().to(DEVICE)
    for pull in (normal(*x.shape, seed=1), lay_out(normal(*x.shape, seed=1), strips=True)):
        check(gpu.run, x, pull.float().to(DEVICE), 0.1, "shared")


@runs
@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_stays_in_its_channel(
    strips: bool, dtype: torch.dtype, parts: int, poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for plan in (Plan(True, 4, 32, 1), Plan(False, 4, 8, 1, 3 // parts, parts)):
        monkeypatch.setattr(gpu, "choose", lambda *_, plan=plan: plan)
        x, pull = normal(2, 5, 23).to(dtype), normal(2, 5, 23, seed=1).to(dtype).to(DEVICE)
        clean = [gpu.run(lay_out(x, strips).to(DEVICE), g, 0.1, "shared") for g in (None, pull)]
        x[1, 1, 7] = poison
        dirty = [gpu.run(lay_out(x, strips).to(DEVICE), g, 0.1, "shared") for g in (None, pull)]
        for before, after in zip(clean, dirty, strict=True):
            assert after[1, 1].isnan().all()
            after[1, 1] = before[1, 1]
            assert torch.equal(before, after)


@runs
@pytest.mark.parametrize("e_lambda", [1e-300, 1e300])
@pytest.mark.parametrize("parts", [0, 1, 2])
def test_lambda_that_float32_cannot_hold(
    e_lambda: float, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(False, 4, 8, 1, 2 // parts, parts) if parts else Plan(True, 4, 16, 1)
    monkeypatch.setattr(gpu, "choose", lambda *_: plan)
    # Constant and far from zero: what the tile has beyond the map must not count.
    x = torch.full((1, 2, 13), 1e4, device=DEVICE)
    gate = torch.sigmoid(torch.tensor(0.5))
    torch.testing.assert_close(gpu.run(x, None, e_lambda, "shared").cpu(), x.cpu() * gate)
    torch.testing.assert_close(gpu.run(x, x, e_lambda, "shared").cpu(), x.cpu() * gate)


@runs
def test_nothing_to_compute() -> None:
    for shape in [(0, 2, 3), (2, 0, 3)]:
        assert gpu.run(torch.ones(shape, device=DEVICE), None, 0.1, "shared").shape == shape


@runs
def test_nothing_is_read_or_written_beyond_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (2, 3, 21)
    count = math.prod(shape)
    plans = [Plan(True, 4, 32, 1), Plan(False, 4, 8, 1, 3), Plan(False, 4, 8, 1, 2, 2)]
    for plan, strips in itertools.product(plans, [False, True]):
        monkeypatch.setattr(gpu, "choose", lambda *_, plan=plan: plan)
        store = torch.full((count + 128,), math.nan)
        store[64 : 64 + count] = normal(*shape).flatten().float()
        x = store.to(DEVICE)[64 : 64 + count]
        x = x.reshape(2, 21, 3).movedim(2, 1) if strips else x.reshape(shape)
        assert not gpu.run(x, None, 0.1, "shared").isnan().any()
        assert not gpu.run(x, x, 0.1, "shared").isnan().any()


class OnAGPU(SimpleNamespace):
    """As much of a tensor on a GPU as routing looks at."""

    is_cpu, is_cuda, device = False, True, torch.device("cuda", 0)


def test_what_the_kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "missing", "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu.able.cache_clear()
    assert all(kernels.serve(OnAGPU(dtype=dtype)) for dtype in gpu.DTYPES)
    assert not kernels.serve(OnAGPU(dtype=torch.float64))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu.able.cache_clear()
    assert not kernels.serve(OnAGPU(dtype=torch.float32))
    gpu.able.cache_clear()
    monkeypatch.setattr(gpu, "missing", "Triton is not installed")
    assert not kernels.serve(OnAGPU(dtype=torch.float32))


def test_missing_triton_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels._warn.cache_clear()
    monkeypatch.setattr(gpu, "missing", "Triton is not installed")
    monkeypatch.setattr(torch.version, "cuda", None)
    kernels.tell_missing(OnAGPU())  # of another maker, for which there is no kernel to miss
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.warns(RuntimeWarning, match=r"without its fused GPU kernel, .*: Triton is not"):
        kernels.tell_missing(OnAGPU())
    kernels.tell_missing(OnAGPU())
    kernels._warn.cache_clear()


@given(
    samples=st.integers(1, 600),
    channels=st.one_of(st.integers(1, 100), st.integers(1, 2**31)),
    positions=st.one_of(st.integers(1, 100), st.integers(1, 2**31)),
    size=st.sampled_from([2, 4]),
    strips=st.booleans(),
    backward=st.booleans(),
    count=st.sampled_from([1, 108, 132]),
)
def test_choice(
    samples: int,
    channels: int,
    positions: int,
    size: int,
    strips: bool,
    backward: bool,
    count: int,
) -> None:
    plan = gpu.choose(samples, channels, positions, size, strips, backward, count)
    for number in (plan.channels, plan.positions, plan.warps):
        assert number & (number - 1) == 0
    assert plan.channels < 2 * channels
    assert plan.channels * plan.positions <= (gpu.MOST_BACKWARD if backward else gpu.MOST_FORWARD)
    assert plan.warps <= 32
    assert plan.parts <= gpu.PARTS
    # No position is left out, and no part is without one.
    step = plan.steps * plan.positions
    assert (plan.parts - 1) * step < positions <= plan.parts * step
    assert not plan.whole or plan.parts == plan.steps == 1
    if strips:  # the largest place within a tile
        assert (plan.positions - 1) * channels + plan.channels < 2**31


def test_choice_of_well_known_sizes() -> None:
    # Small rows fill a tile together; a ResNet's largest map is whole in a tile; a line of the
    # cache is read at once in strips where it fits.
    assert gpu.choose(1, 512 * 32, 49, 4, False, False, 132)[:4] == (True, 32, 64, 4)
    assert gpu.choose(1, 64 * 32, 12544, 2, False, False, 132)[:4] == (True, 1, 16384, 16)
    assert gpu.choose(32, 512, 49, 2, True, True, 132)[:4] == (True, 64, 64, 8)
    # Two rows of a million positions are shared by all multiprocessors.
    assert gpu.choose(1, 2, 2**20, 4, False, False, 132).parts == 32
    assert gpu.choose(1, 2000, 2**20, 4, False, False, 132).parts == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
class TestOnAGPU:
    def test_the_operators_run_the_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        run = gpu.run
        monkeypatch.setattr(gpu, "run", lambda *a: calls.append(a[1] is None) or run(*a))
        x = normal(2, 3, 4, 5).float().cuda()
        output = torch.ops.simam.forward(x, 0.1, "shared")
        torch.ops.simam.backward(torch.ones_like(output), x, 0.1, "shared")
        assert calls == [True, False]

    @pytest.mark.parametrize("strips", [False, True], ids=["rows", "strips"])
    def test_numbers_of_64_bits(self, strips: bool) -> None:
        if torch.cuda.mem_get_info()[0] < 12e9:
            pytest.skip("there is too little memory for two maps of over 2^31 elements")
        last = normal(64).bfloat16().cuda()
        if strips:
            x = torch.zeros((1, 2**25 + 8, 64), dtype=torch.bfloat16, device="cuda")
            x = x.movedim(2, 1)
            x[0, :, -1] = last
            # Alone among millions of zeros a neuron stands out so far that its gate is one.
            expected = last
        else:
            x = torch.zeros((2**25 + 8, 1, 64), dtype=torch.bfloat16, device="cuda")
            x[-1, 0] = last
            expected = reference.forward(last[None, None], 1e-9, "shared")[0, 0]
        y = gpu.run(x, None, 1e-9, "shared")
        torch.testing.assert_close(y[0, :, -1] if strips else y[-1, 0], expected)
        assert y.count_nonzero() == last.count_nonzero()

    def test_cuda_graph(self) -> None:
        x = normal(2, 3, 4, 5).float().cuda()
        expected = gpu.run(2 * x, None, 0.1, "shared")
        gpu.run(x, None, 0.1, "shared")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = gpu.run(x, None, 0.1, "shared")
        x *= 2
        graph.replay()
        assert torch.equal(y, expected)

    def test_no_compilation_for_another_batch(self) -> None:
        triton = pytest.importorskip("triton", reason="it compiles the kernels")
        compiled = []
        gpu.run(torch.ones(2, 3, 50, device="cuda"), None, 0.1, "shared")
        triton.knobs.runtime.jit_post_compile_hook = lambda **_: compiled.append(1)
        try:
            for batch in (1, 3, 16, 170):
                gpu.run(torch.ones(batch, 3, 50, device="cuda"), None, 0.1, "shared")
        finally:
            triton.knobs.runtime.jit_post_compile_hook = None
        assert not compiled

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
    def test_another_device_than_the_current_one(self) -> None:
        x = normal(2, 3, 4, 5).float()
        actual = gpu.run(x.to("cuda:1"), None, 0.1, "shared")
        assert actual.device.index == 1
        torch.testing.assert_close(actual.cpu(), reference.forward(x, 0.1, "shared"))


def compare(shape: tuple[int, ...], strips: bool, statistics: str, dtype: torch.dtype) -> None:
    x = lay_out(normal(*shape), strips).to(dtype).to(DEVICE)
    pull = normal(*shape, seed=1).to(dtype).to(DEVICE)
    # The interpreter cuts the digits that bfloat16 has no room for.
    truncates = INTERPRETED and dtype == torch.bfloat16
    check(gpu.run, x, pull, 1e-4, statistics, truncates=truncates)
