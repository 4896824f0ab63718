"""The GPU kernels against float64: on a GPU, or in Triton's interpreter on the CPU.

TRITON_INTERPRET has to be set before Triton is imported. Without a GPU, run this file in a process
of its own: TRITON_INTERPRET=1 python -m pytest tests/kernels/test_triton.py
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simam import kernels, reference
from simam.kernels import gpu
from simam.kernels.gpu import TileConfig
from tests.helpers.kernel_checks import check, lay_out, normal

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
STATISTICS = ("shared", "leave_one_out")

# The interpreter computes with numpy, which warns about the NaN and infinities of these tests.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
both_statistics = pytest.mark.parametrize("statistics", STATISTICS)
both_layouts = pytest.mark.parametrize(
    "channels_last", [False, True], ids=["contiguous", "channels_last"]
)


def runs_kernels(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on a GPU, or in the interpreter if it was requested; else skip it."""
    skip = pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="there is no GPU, and TRITON_INTERPRET is not set",
    )
    return pytest.mark.gpu(skip(test))


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Make torch fill new memory with NaN, so that unwritten elements show."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Tiles that fit, that extend beyond the map, and that hold one channel or one position. Each is a
# function of the smallest power of two that is at least the number of positions.
CONFIGS = {
    "single pass": lambda all_positions: TileConfig(True, 4, all_positions, 1),
    "single pass, one channel": lambda all_positions: TileConfig(True, 1, all_positions, 1),
    "looped": lambda _: TileConfig(False, 4, 8, 1),
    "looped, one position": lambda _: TileConfig(False, 8, 1, 1),
    "two splits": lambda _: TileConfig(False, 4, 8, 1, tiles_per_split=2, num_splits=2),
    "seven splits": lambda _: TileConfig(False, 2, 4, 1, tiles_per_split=1, num_splits=7),
}
# N, C, M. Two splits cover at most 32 positions, seven splits at most 28.
SHAPES = [(2, 3, 1), (2, 5, 7), (1, 4, 16), (1, 9, 17), (1, 3, 27)]


@runs_kernels
@pytest.mark.parametrize("config", CONFIGS)
@both_layouts
@pytest.mark.parametrize(
    ("dtype", "statistics"),
    [
        (torch.float32, "shared"),
        (torch.float32, "leave_one_out"),
        (torch.bfloat16, "shared"),
        # float16 differs from bfloat16 in the conversion alone, which the chosen configs run.
        pytest.param(torch.float16, "shared", marks=pytest.mark.sweep),
    ],
)
def test_forward_and_backward_with_every_tile_config(
    config: str,
    channels_last: bool,
    statistics: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The dtype changes only loads and stores, so half precision takes the two longest shapes.
    for shape in SHAPES if dtype == torch.float32 else SHAPES[-2:]:
        chosen = CONFIGS[config](1 << (shape[2] - 1).bit_length())
        # As `choose_config` does: one split covers all tiles, and no split is empty.
        tiles = -(-shape[2] // chosen.block_m)
        num_splits = min(chosen.num_splits, -(-tiles // chosen.tiles_per_split))
        tiles_per_split = tiles if num_splits == 1 else chosen.tiles_per_split
        chosen = chosen._replace(num_splits=num_splits, tiles_per_split=tiles_per_split)
        monkeypatch.setattr(gpu, "choose_config", lambda *_, chosen=chosen: chosen)
        compare(shape, channels_last, statistics, dtype)


@runs_kernels
@both_layouts
@both_statistics
@pytest.mark.parametrize(
    "shape",
    [(1, 2, 49), (3, 70, 49), (1, 3, 196), (1, 2, 3136), (1, 1, 7200), (1, 1, 33000), (1, 33, 700)],
    ids=str,
)
def test_forward_and_backward_with_the_chosen_config(
    shape: tuple[int, ...], channels_last: bool, statistics: str
) -> None:
    for dtype in (torch.float32, torch.float16):
        compare(shape, channels_last, statistics, dtype)


@runs_kernels
@both_layouts
@pytest.mark.parametrize("shape", [(1, 2, 49), (1, 1, 3136), (1, 2, 512 * 512)], ids=str)
def test_forward_is_accurate_far_from_zero(shape: tuple[int, ...], channels_last: bool) -> None:
    # In float32, a value near 100 is stored to the fifth decimal, and so are the deviations.
    x = lay_out(normal(*shape) + 100, channels_last).float()
    expected = reference.forward(x.double(), 1e-4, "shared")
    actual = gpu.forward(x.to(DEVICE), 1e-4, "shared").cpu().double()
    assert ((actual - expected) / expected).abs().max() < 1e-6


@runs_kernels
@both_layouts
@both_statistics
@pytest.mark.parametrize("std", [1e-3, 1.0, 1e3])
def test_forward_gate_is_exact_to_2e_7(channels_last: bool, statistics: str, std: float) -> None:
    x = lay_out(std * normal(2, 16, 196), channels_last).float()
    gate = reference.attention(x.double(), 1e-4, statistics)
    actual = gpu.forward(x.to(DEVICE), 1e-4, statistics).cpu().double() / x.double()
    # The quotient includes the rounding error of the product.
    assert (actual - gate).abs().max() < 2e-7 + torch.finfo(torch.float32).eps / 2


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "one channel": lambda x: x[:, :1].contiguous(),
    "misaligned": lambda x: torch.cat([x.flatten(), x.flatten()[:1]])[1:].reshape(x.shape),
    "one dimension": lambda x: x.flatten(2),
    "three dimensions": lambda x: lay_out(x.unflatten(3, (2, 3)), True),
}


@runs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_backward_in_every_layout(layout: str) -> None:
    x = LAYOUTS[layout](normal(2, 3, 4, 6)).float().to(DEVICE)
    for grad_output in (normal(*x.shape, seed=1), lay_out(normal(*x.shape, seed=1), True)):
        check(gpu, x, grad_output.float().to(DEVICE), 0.1, "shared")


@runs_kernels
@both_layouts
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    ("poison", "dtype"),
    [
        *itertools.product([math.nan, math.inf, -math.inf], [torch.float32]),
        (math.nan, torch.bfloat16),
        pytest.param(math.inf, torch.bfloat16, marks=pytest.mark.sweep),
    ],
)
def test_forward_and_backward_keep_nan_and_inf_in_their_channel(
    channels_last: bool,
    dtype: torch.dtype,
    num_splits: int,
    poison: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = lay_out(x, channels_last).to(DEVICE)
        return gpu.forward(x, 0.1, "shared"), gpu.backward(grad_output, x, 0.1, "shared")

    for config in (
        TileConfig(True, 4, 32, 1),
        TileConfig(False, 4, 8, 1, 3 // num_splits, num_splits),
    ):
        monkeypatch.setattr(gpu, "choose_config", lambda *_, config=config: config)
        x, grad_output = normal(2, 5, 23).to(dtype), normal(2, 5, 23, seed=1).to(dtype).to(DEVICE)
        clean = run(x)
        x[1, 1, 7] = poison
        for before, after in zip(clean, run(x), strict=True):
            assert after[1, 1].isnan().all()
            after[1, 1] = before[1, 1]
            assert torch.equal(before, after)


@runs_kernels
@pytest.mark.parametrize("e_lambda", [1e-300, 1e300])
@pytest.mark.parametrize("num_splits", [0, 1, 2], ids=["single pass", "looped", "two splits"])
def test_forward_and_backward_with_lambda_beyond_float32(
    e_lambda: float, num_splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TileConfig(True, 4, 16, 1)
    if num_splits:
        config = TileConfig(False, 4, 8, 1, 2 // num_splits, num_splits)
    monkeypatch.setattr(gpu, "choose_config", lambda *_: config)
    # Constant and far from zero, so that elements of the tile outside the map would show.
    x = torch.full((1, 2, 13), 1e4, device=DEVICE)
    gate = torch.sigmoid(torch.tensor(0.5))
    torch.testing.assert_close(gpu.forward(x, e_lambda, "shared").cpu(), x.cpu() * gate)
    torch.testing.assert_close(gpu.backward(x, x, e_lambda, "shared").cpu(), x.cpu() * gate)


@runs_kernels
def test_forward_of_an_empty_map() -> None:
    for shape in [(0, 2, 3), (2, 0, 3)]:
        assert gpu.forward(torch.ones(shape, device=DEVICE), 0.1, "shared").shape == shape


@runs_kernels
def test_forward_and_backward_stay_within_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (2, 3, 21)
    count = math.prod(shape)
    configs = [
        TileConfig(True, 4, 32, 1),
        TileConfig(False, 4, 8, 1, 3),
        TileConfig(False, 4, 8, 1, 2, 2),
    ]
    for config, channels_last in itertools.product(configs, [False, True]):
        monkeypatch.setattr(gpu, "choose_config", lambda *_, config=config: config)
        storage = torch.full((count + 128,), math.nan)
        storage[64 : 64 + count] = normal(*shape).flatten().float()
        x = storage.to(DEVICE)[64 : 64 + count]
        x = x.reshape(2, 21, 3).movedim(2, 1) if channels_last else x.reshape(shape)
        assert not gpu.forward(x, 0.1, "shared").isnan().any()
        assert not gpu.backward(x, x, 0.1, "shared").isnan().any()


class GPUTensor(SimpleNamespace):
    """The attributes of a tensor on a GPU that dispatch reads."""

    is_cpu, is_cuda, device = False, True, torch.device("cuda", 0)


def test_is_supported_checks_dtype_capability_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "unavailable_reason", "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu.device_supported.cache_clear()
    assert all(kernels.is_supported(GPUTensor(dtype=dtype)) for dtype in gpu.DTYPES)
    assert not kernels.is_supported(GPUTensor(dtype=torch.float64))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu.device_supported.cache_clear()
    assert not kernels.is_supported(GPUTensor(dtype=torch.float32))
    gpu.device_supported.cache_clear()
    monkeypatch.setattr(gpu, "unavailable_reason", "Triton is not installed")
    assert not kernels.is_supported(GPUTensor(dtype=torch.float32))


def test_warn_if_unavailable_warns_once_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels._warn.cache_clear()
    monkeypatch.setattr(gpu, "unavailable_reason", "Triton is not installed")
    monkeypatch.setattr(torch.version, "cuda", None)
    kernels.warn_if_unavailable(GPUTensor())  # silent: an AMD GPU, which has no kernel
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.warns(RuntimeWarning, match=r"without its fused GPU kernel, .*: Triton is not"):
        kernels.warn_if_unavailable(GPUTensor())
    kernels.warn_if_unavailable(GPUTensor())
    kernels._warn.cache_clear()


@given(
    samples=st.integers(1, 600),
    channels=st.one_of(st.integers(1, 100), st.integers(1, 2**31)),
    positions=st.one_of(st.integers(1, 100), st.integers(1, 2**31)),
    element_size=st.sampled_from([2, 4]),
    channels_last=st.booleans(),
    backward=st.booleans(),
    multiprocessors=st.sampled_from([1, 108, 132]),
)
def test_choose_config_is_valid_for_every_size(
    samples: int,
    channels: int,
    positions: int,
    element_size: int,
    channels_last: bool,
    backward: bool,
    multiprocessors: int,
) -> None:
    config = gpu.choose_config(
        samples, channels, positions, element_size, channels_last, backward, multiprocessors
    )
    for number in (config.block_c, config.block_m, config.num_warps):
        assert number & (number - 1) == 0
    assert config.block_c < 2 * channels
    max_tile = gpu.MAX_TILE_BACKWARD if backward else gpu.MAX_TILE_FORWARD
    assert config.block_c * config.block_m <= max_tile
    assert config.num_warps <= 32
    assert config.num_splits <= gpu.MAX_SPLITS
    # The splits cover all positions, and none of them is empty.
    length = config.tiles_per_split * config.block_m
    assert (config.num_splits - 1) * length < positions <= config.num_splits * length
    assert not config.single_pass or config.num_splits == config.tiles_per_split == 1
    if channels_last:  # the largest offset within a tile
        assert (config.block_m - 1) * channels + config.block_c < 2**31


def test_choose_config_of_well_known_sizes() -> None:
    # Short channels fill a tile together; a ResNet's largest map fits a tile; channels-last tiles
    # hold a whole cache line where it fits.
    assert gpu.choose_config(1, 512 * 32, 49, 4, False, False, 132)[:4] == (True, 32, 64, 4)
    assert gpu.choose_config(1, 64 * 32, 12544, 2, False, False, 132)[:4] == (True, 1, 16384, 16)
    assert gpu.choose_config(32, 512, 49, 2, True, True, 132)[:4] == (True, 64, 64, 8)
    # All multiprocessors share two channels of a million positions.
    assert gpu.choose_config(1, 2, 2**20, 4, False, False, 132).num_splits == 32
    assert gpu.choose_config(1, 2000, 2**20, 4, False, False, 132).num_splits == 1


# The largest M of each BLOCK_C, as in the table of kernels/README.md.
@pytest.mark.parametrize(
    ("element_size", "backward", "limits"),
    [
        (4, False, {32: 512, 16: 1024, 8: 4096}),
        (4, True, {32: 512, 16: 1024, 8: 2048}),
        (2, False, {64: 256, 32: 512, 16: 2048}),
        (2, True, {64: 256, 32: 512, 16: 1024}),
    ],
)
def test_choose_config_limits_of_channels_last(
    element_size: int, backward: bool, limits: dict[int, int]
) -> None:
    for block_c, positions in limits.items():
        config = gpu.choose_config(32, 512, positions, element_size, True, backward, 132)
        assert config[:2] == (True, block_c)
        config = gpu.choose_config(32, 512, positions + 1, element_size, True, backward, 132)
        assert config[:2] != (True, block_c)
    assert not config.single_pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
class TestGPU:
    def test_forward_op_and_backward_op_run_the_kernels(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []
        forward, backward = gpu.forward, gpu.backward
        monkeypatch.setattr(gpu, "forward", lambda *a: calls.append("forward") or forward(*a))
        monkeypatch.setattr(gpu, "backward", lambda *a: calls.append("backward") or backward(*a))
        x = normal(2, 3, 4, 5).float().cuda()
        output = torch.ops.simam.forward(x, 0.1, "shared")
        torch.ops.simam.backward(torch.ones_like(output), x, 0.1, "shared")
        assert calls == ["forward", "backward"]

    @both_layouts
    def test_forward_with_64_bit_offsets(self, channels_last: bool) -> None:
        if torch.cuda.mem_get_info()[0] < 12e9:
            pytest.skip("not enough memory for two maps of over 2^31 elements")
        last = normal(64).bfloat16().cuda()
        if channels_last:
            x = torch.zeros((1, 2**25 + 8, 64), dtype=torch.bfloat16, device="cuda")
            x = x.movedim(2, 1)
            x[0, :, -1] = last
            # A lone neuron among millions of zeros stands out so far that its gate is one.
            expected = last
        else:
            x = torch.zeros((2**25 + 8, 1, 64), dtype=torch.bfloat16, device="cuda")
            x[-1, 0] = last
            expected = reference.forward(last[None, None], 1e-9, "shared")[0, 0]
        y = gpu.forward(x, 1e-9, "shared")
        torch.testing.assert_close(y[0, :, -1] if channels_last else y[-1, 0], expected)
        assert y.count_nonzero() == last.count_nonzero()

    def test_forward_in_a_cuda_graph(self) -> None:
        x = normal(2, 3, 4, 5).float().cuda()
        expected = gpu.forward(2 * x, 0.1, "shared")
        gpu.forward(x, 0.1, "shared")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = gpu.forward(x, 0.1, "shared")
        x *= 2
        graph.replay()
        assert torch.equal(y, expected)

    def test_forward_compiles_nothing_for_another_batch_size(self) -> None:
        triton = pytest.importorskip("triton", reason="it compiles the kernels")
        compiled = []
        gpu.forward(torch.ones(2, 3, 50, device="cuda"), 0.1, "shared")
        triton.knobs.runtime.jit_post_compile_hook = lambda **_: compiled.append(1)
        try:
            for batch in (1, 3, 16, 170):
                gpu.forward(torch.ones(batch, 3, 50, device="cuda"), 0.1, "shared")
        finally:
            triton.knobs.runtime.jit_post_compile_hook = None
        assert not compiled

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
    def test_forward_on_another_device_than_the_current_one(self) -> None:
        x = normal(2, 3, 4, 5).float()
        actual = gpu.forward(x.to("cuda:1"), 0.1, "shared")
        assert actual.device.index == 1
        torch.testing.assert_close(actual.cpu(), reference.forward(x, 0.1, "shared"))


def compare(
    shape: tuple[int, ...], channels_last: bool, statistics: str, dtype: torch.dtype
) -> None:
    x = lay_out(normal(*shape), channels_last).to(dtype).to(DEVICE)
    grad_output = normal(*shape, seed=1).to(dtype).to(DEVICE)
    # The interpreter truncates when it converts to bfloat16.
    truncates = INTERPRETED and dtype == torch.bfloat16
    check(gpu, x, grad_output, 1e-4, statistics, truncates=truncates)
