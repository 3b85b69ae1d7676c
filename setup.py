"""Build the C++ extension ``megatron_adapt._csrc``; everything else is in pyproject.toml."""

import os
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_adapt._csrc",
            sources=sorted(map(str, Path("csrc").glob("*.cpp"))),
            include_dirs=["csrc"],
            depends=sorted(map(str, Path("csrc").glob("*.h"))),
            cxx_std=17,
            # Without a compiler the numpy twins serve; CI sets the variable so that a broken build fails.
            optional=os.environ.get("MEGATRON_ADAPT_REQUIRE_CSRC") != "1",
        )
    ]
)
