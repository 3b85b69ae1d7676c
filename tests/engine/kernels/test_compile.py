"""The kernels compile for a GPU on a machine without one: the interpreter accepts what the compiler refuses."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

PROGRAM = """
import importlib
import itertools
import triton
from triton.backends.compiler import GPUTarget

# Pointers to something else than activations.
POINTERS = {
    "rstd_ptr": "*fp32", "sums_ptr": "*fp32", "angles_ptr": "*fp32", "own_ptr": "*i64", "highest_ptr": "*fp32",
    "sum_ptr": "*fp32", "target_ptr": "*fp32", "factor_ptr": "*fp32", "scale_ptr": "*fp32",
}
CONSTANTS = {
    ("rms_norm", "_normalise"): dict(ROWS=1, COLUMNS=4096),
    ("rms_norm", "_differentiate"): dict(OF_HIDDEN=True, OF_WEIGHT=True, ROWS=2, COLUMNS=1024),
    ("swiglu", "_gate"): dict(BLOCK=1024),
    ("swiglu", "_differentiate"): dict(BLOCK=1024),
    ("rope", "_rotate"): dict(WIDTH=96, ROTATED=64, BACKWARDS=True, HEADS=4, PAIRS=32, REST=32),
    ("linear_cross_entropy", "_normalise_row"): dict(BLOCK=4096),
    ("linear_cross_entropy", "_differentiate_block"): dict(BLOCK=4096),
}


def find_type(argument, constants, dtype):
    if argument in constants:
        return "constexpr"
    if argument.endswith("_ptr"):
        return POINTERS.get(argument, "*" + dtype)
    return "fp32" if argument == "eps" else "i32"


for ((module, name), constants), dtype in itertools.product(CONSTANTS.items(), ("fp32", "bf16", "fp16")):
    kernel = getattr(importlib.import_module(f"megatron_adapt.engine.kernels.gpu.{module}"), name)
    types = {argument: find_type(argument, constants, dtype) for argument in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants, attrs={})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
    # Angles are far beyond what the fast instructions are made for.
    assert not any(fast in compiled.asm["ptx"] for fast in ("cos.approx", "sin.approx"))
    print("compiled", module, name, dtype)
"""


def test_every_kernel_compiles_for_a_hopper_gpu(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled") == 7 * 3
