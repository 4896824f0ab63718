"""The GPU kernels compile for real GPUs. Triton includes its compiler, so no GPU is needed.

The interpreter of test_triton.py accepts programs that the compiler refuses.
"""

import itertools
import math
import os
from pathlib import Path

import pytest
import torch

from simam.kernels import gpu

pytest.importorskip("triton", minversion="3.6", reason="it compiles the kernels")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
MULTIPROCESSORS = 132

# Channels of a sample, positions and samples, for which `choose_config` chooses each kernel.
SHAPES = {
    "single pass": (64, 49, 8),
    "looped": (64, 50_176, 64),
    "split": (8, 50_176, 1),
}
# The shape of each kernel, and whether it belongs to the backward pass.
KERNELS = {
    "forward_single_pass": ("single pass", False),
    "backward_single_pass": ("single pass", True),
    "forward_looped": ("looped", False),
    "backward_looped": ("looped", True),
    "partial_moments": ("split", False),
    "partial_sums": ("split", True),
}
both_layouts = pytest.mark.parametrize(
    "channels_last", [False, True], ids=["contiguous", "channels_last"]
)


def compile_kernel(
    name: str,
    shape: tuple[int, int, int],
    channels_last: bool,
    dtype: torch.dtype,
    *,
    backward: bool,
    leave_one_out: bool = False,
    capability: int = 90,
    integers: str = "i32",
) -> str:
    """Return the PTX of a kernel, with the tiles that `gpu` chooses for a shape."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from simam.kernels import triton_kernels

    channels, positions, samples = shape
    if not channels_last:
        samples, channels = 1, samples * channels
    config = gpu.choose_config(
        samples, channels, positions, dtype.itemsize, channels_last, backward, MULTIPROCESSORS
    )
    constants = {
        "LEAVE_ONE_OUT": leave_one_out,
        "CHANNELS_LAST": channels_last,
        "DIVISIBILITY": math.gcd(channels if channels_last else positions, 16),
        "BLOCK_C": config.block_c,
        "BLOCK_M": config.block_m,
        "MAX_SPLITS": 1 if config.num_splits == 1 else gpu.MAX_SPLITS,
    }
    sizes = ("channels", "positions", "tiles_per_split", "split_stride")
    kernel = getattr(triton_kernels, name)
    types = {
        **dict.fromkeys(("x", "out", "dy", "dx"), TYPES[dtype]),
        "partials": "*fp32",
        "e_lambda": "fp32",
        **dict.fromkeys(sizes, integers),
        **dict.fromkeys(constants, "constexpr"),
    }
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name][0] == "*"},
    )
    options = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    return triton.compile(source, GPUTarget("cuda", capability, 32), options).asm["ptx"]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", KERNELS)
@both_layouts
@pytest.mark.parametrize(
    ("capability", "dtype", "leave_one_out"),
    [
        (80, torch.float32, True),
        (90, torch.bfloat16, False),
        pytest.param(80, torch.bfloat16, False, marks=pytest.mark.sweep),
        pytest.param(90, torch.float32, True, marks=pytest.mark.sweep),
    ],
)
def test_kernel_compiles(
    name: str, channels_last: bool, capability: int, dtype: torch.dtype, leave_one_out: bool
) -> None:
    shape, backward = KERNELS[name]
    code = compile_kernel(
        name,
        SHAPES[shape],
        channels_last,
        dtype,
        backward=backward,
        leave_one_out=leave_one_out,
        capability=capability,
    )
    assert f".target sm_{capability}" in code


@pytest.mark.parametrize("name", ["forward_looped", "backward_looped"])
@pytest.mark.parametrize(
    "channels_last",
    [pytest.param(False, marks=pytest.mark.sweep), True],
    ids=["contiguous", "channels_last"],
)
def test_looped_kernel_compiles_with_several_splits(name: str, channels_last: bool) -> None:
    backward = KERNELS[name][1]
    code = compile_kernel(name, SHAPES["split"], channels_last, torch.float16, backward=backward)
    assert f".entry {name}" in code


@pytest.mark.parametrize("name", ["forward_single_pass", "backward_looped"])
def test_kernel_compiles_with_64_bit_sizes(name: str) -> None:
    shape, backward = KERNELS[name]
    code = compile_kernel(
        name, SHAPES[shape], True, torch.bfloat16, backward=backward, integers="i64"
    )
    assert ".param .u64" in code


def test_kernel_reads_and_writes_sixteen_bytes_at_once() -> None:
    # Where the size of the map allows it: 784 is a multiple of 16, 49 is odd.
    for name, channels_last, dtype in itertools.product(
        ("forward_single_pass", "backward_single_pass"),
        (False, True),
        (torch.float32, torch.bfloat16),
    ):
        backward = name == "backward_single_pass"
        wide = compile_kernel(name, (64, 784, 4), channels_last, dtype, backward=backward)
        assert "ld.global.v4.b32" in wide
        assert "st.global.v4.b32" in wide
        assert "ld.global.b" not in wide
    narrow = compile_kernel(
        "forward_single_pass", (64, 49, 4), False, torch.float32, backward=False
    )
    assert "ld.global.v4" not in narrow
