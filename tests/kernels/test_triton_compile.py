"""The GPU kernels compile for real GPUs, which takes none: Triton brings its compiler along.

The interpreter of test_triton.py takes programs that a GPU's compiler refuses.
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

# Of each: channels of a sample, positions, and samples, with which the plan is another one.
SHAPES = {
    "whole": (64, 49, 8),
    "along": (64, 50_176, 64),
    "in parts": (8, 50_176, 1),
}
ARGUMENTS = {
    "forward_whole": ("whole", False),
    "backward_whole": ("whole", True),
    "forward_along": ("along", False),
    "backward_along": ("along", True),
    "moments_in_parts": ("in parts", False),
    "sums_in_parts": ("in parts", True),
}


def compile_kernel(
    name: str,
    shape: tuple[int, int, int],
    strips: bool,
    dtype: torch.dtype,
    *,
    backward: bool,
    leave_one_out: bool = False,
    capability: int = 90,
    integers: str = "i32",
) -> str:
    """The assembly of a kernel with the plan of a shape, as `gpu` launches it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from simam.kernels import triton_kernels

    channels, positions, samples = shape
    if not strips:
        samples, channels = 1, samples * channels
    plan = gpu.choose(
        samples, channels, positions, dtype.itemsize, strips, backward, MULTIPROCESSORS
    )
    known = {
        "LEAVE_ONE_OUT": leave_one_out,
        "STRIPS": strips,
        "ALIGN": math.gcd(channels if strips else positions, 16),
        "CHANNELS": plan.channels,
        "POSITIONS": plan.positions,
        "PARTS": 1 if plan.parts == 1 else gpu.PARTS,
    }
    function = getattr(triton_kernels, name)
    types = {
        **dict.fromkeys(("x", "gradient", "result"), TYPES[dtype]),
        "found": "*fp32",
        "e_lambda": "fp32",
        **dict.fromkeys(("channels", "positions", "steps", "width"), integers),
        **dict.fromkeys(known, "constexpr"),
    }
    names = function.arg_names
    source = ASTSource(
        function,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in known.items() if name in names},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name][0] == "*"},
    )
    options = {"num_warps": plan.warps, "enable_fp_fusion": True}
    return triton.compile(source, GPUTarget("cuda", capability, 32), options).asm["ptx"]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("strips", [False, True], ids=["rows", "strips"])
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(name: str, strips: bool, capability: int) -> None:
    kind, backward = ARGUMENTS[name]
    for dtype, leave_one_out in ((torch.float32, True), (torch.bfloat16, False)):
        assert f".target sm_{capability}" in compile_kernel(
            name,
            SHAPES[kind],
            strips,
            dtype,
            backward=backward,
            leave_one_out=leave_one_out,
            capability=capability,
        )


@pytest.mark.parametrize("name", ["forward_along", "backward_along"])
@pytest.mark.parametrize("strips", [False, True], ids=["rows", "strips"])
def test_what_parts_have_found_is_taken_up(name: str, strips: bool) -> None:
    backward = ARGUMENTS[name][1]
    code = compile_kernel(name, SHAPES["in parts"], strips, torch.float16, backward=backward)
    assert f".entry {name}" in code


@pytest.mark.parametrize("name", ["forward_whole", "backward_along"])
def test_sizes_of_64_bits_compile(name: str) -> None:
    kind, backward = ARGUMENTS[name]
    code = compile_kernel(
        name, SHAPES[kind], True, torch.bfloat16, backward=backward, integers="i64"
    )
    assert ".param .u64" in code


def test_neighbours_are_read_sixteen_bytes_at_a_time() -> None:
    # Where the map's size allows it: 784 is a multiple of 16, 49 is odd.
    for name, strips, dtype in itertools.product(
        ("forward_whole", "backward_whole"), (False, True), (torch.float32, torch.bfloat16)
    ):
        backward = name == "backward_whole"
        wide = compile_kernel(name, (64, 784, 4), strips, dtype, backward=backward)
        assert "ld.global.v4.b32" in wide
        assert "st.global.v4.b32" in wide
        assert "ld.global.b" not in wide
    narrow = compile_kernel("forward_whole", (64, 49, 4), False, torch.float32, backward=False)
    assert "ld.global.v4" not in narrow
