"""A pytest plugin that runs the CPU kernel in another process, which may emulate a processor.

The command is in SIMAM_REMOTE_KERNEL; it runs a program built from remote_kernel.c. Example:
SIMAM_REMOTE_KERNEL="qemu-aarch64 ./kernel" python -m pytest -p tests.helpers.remote_kernel
"""

import ctypes
import os
import shlex
import struct
import subprocess
import threading

from simam.kernels import cpu

_ELEMENT_SIZES = (8, 4, 2, 2)  # of the dtypes in csrc/types.h


class RemoteLibrary:
    """Stands in for the loaded library. The process runs every call on one thread."""

    def __init__(self, command: str) -> None:
        self.process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.lock = threading.Lock()

    def simam_forward(self, x: int, out: int, *options: float) -> int:
        return self._run([x], out, *options)

    def simam_backward(self, dy: int, x: int, dx: int, *options: float) -> int:
        return self._run([x, dy], dx, *options)

    def simam_cpu_level(self) -> bytes:
        return b"remote"

    def _run(self, inputs: list[int], out: int, *options: float) -> int:
        samples, channels, positions, e_lambda, dtype, channels_last, leave_one_out = options[:7]
        size = int(samples * channels * positions) * _ELEMENT_SIZES[int(dtype)]
        counts = (size, len(inputs) - 1, samples, channels, positions)
        request = struct.pack("=5qd3q", *counts, e_lambda, dtype, channels_last, leave_one_out)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.lock:
            for data in (request, *(ctypes.string_at(pointer, size) for pointer in inputs)):
                self.process.stdin.write(data)
            self.process.stdin.flush()
            result = self.process.stdout.read(size)
        if len(result) < size:
            raise RuntimeError("the remote kernel ended early")
        ctypes.memmove(out, result, size)
        return 0


cpu._library = RemoteLibrary(os.environ["SIMAM_REMOTE_KERNEL"])
cpu._parallel_for = None
cpu.unavailable_reason = ""
