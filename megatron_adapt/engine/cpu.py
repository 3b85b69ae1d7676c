"""Run megatron-core on a machine without CUDA; with CUDA every function here does nothing.

megatron-core 0.16 names CUDA directly: ``torch.cuda.current_device()`` as a device, ``device="cuda"`` in
factories, ``tensor.cuda()``, type names such as ``torch.cuda.FloatTensor``. ``install`` answers these from
outside:

1. In modules under ``megatron.core`` - those imported and those that will be - the name ``torch`` is bound to a
   shallow copy of the torch module whose ``cuda`` is a CPU stand-in and whose factories read "cuda" as "cpu".
2. ``Tensor.type``, ``Tensor.cuda`` and ``Module.cuda`` look at their caller, and answer for the CPU only when it
   is megatron-core. Nothing else in the process sees a different torch.
3. Three module constants that were bound at import time are set.

A name that the engine newly asks of CUDA fails loudly in ``tests/engine/test_cpu.py``; the engine is pinned to a
minor version for that reason. Cost: none per call outside the factories.
"""

import functools
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = "tensor zeros ones empty full arange empty_like zeros_like ones_like rand randn randint".split()
_installed_torch: types.ModuleType | None = None


def install() -> None:
    """Bind the stand-ins in every imported and future module of megatron-core. Safe to call again."""
    global _installed_torch
    if torch.cuda.is_available():
        return
    if _installed_torch is None:
        _installed_torch = _build_torch()
        _patch_methods()
        sys.meta_path.insert(0, _BindOnImport())
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and module is not None:
            _bind(module)


def _copy_module(module: types.ModuleType) -> types.ModuleType:
    copy = types.ModuleType(module.__name__, module.__doc__)
    copy.__dict__.update(module.__dict__)
    return copy


def _build_torch() -> types.ModuleType:
    cuda = _copy_module(torch.cuda)
    answers: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "device_count": lambda: 1,
        "set_device": _do_nothing,
        "synchronize": _do_nothing,
        "empty_cache": _do_nothing,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "FloatTensor": torch.FloatTensor,
        "HalfTensor": torch.HalfTensor,
        "BFloat16Tensor": torch.BFloat16Tensor,
    }
    cuda.__dict__.update(answers)
    stand_in = _copy_module(torch)
    stand_in.__dict__["cuda"] = cuda
    for name in _FACTORIES:
        stand_in.__dict__[name] = _on_cpu(getattr(torch, name))
    return stand_in


def _do_nothing(*_: object, **__: object) -> None:
    return None


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


def _called_by_engine() -> bool:
    caller: str = sys._getframe(2).f_globals.get("__name__", "")
    return caller.startswith("megatron.core")


def _patch_methods() -> None:
    tensor_type, tensor_cuda, module_cuda = torch.Tensor.type, torch.Tensor.cuda, torch.nn.Module.cuda

    def type_for_engine(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = tensor_type(self, *args, **kwargs)
        if isinstance(answer, str) and _called_by_engine():
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    def tensor_stays(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_by_engine() else tensor_cuda(self, *args, **kwargs)

    def module_stays(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return self if _called_by_engine() else module_cuda(self, *args, **kwargs)

    patches: tuple[tuple[type, str, Any], ...] = (
        (torch.Tensor, "type", type_for_engine),
        (torch.Tensor, "cuda", tensor_stays),
        (torch.nn.Module, "cuda", module_stays),
    )
    for owner, name, patch in patches:
        setattr(owner, name, patch)


def _bind(module: types.ModuleType) -> None:
    names = module.__dict__
    if names.get("torch") is torch:
        names["torch"] = _installed_torch
    if module.__name__ == "megatron.core.tensor_parallel.random":
        names["_get_cuda_rng_state"] = lambda *_, **__: torch.get_rng_state()
        names["_set_cuda_rng_state"] = lambda state, *_, **__: torch.set_rng_state(state)
    if module.__name__ == "megatron.core.transformer.module":
        # isinstance() against torch.cuda.*Tensor raises in a build of torch without CUDA
        names["_FLOAT_TYPES"] = (torch.FloatTensor,)
        names["_HALF_TYPES"] = (torch.HalfTensor,)
        names["_BF16_TYPES"] = (torch.BFloat16Tensor,)


class _BindOnImport(importlib.abc.MetaPathFinder):
    """Binds modules of megatron-core that are imported after ``install``: its checkpoint writers are."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec
        execute = spec.loader.exec_module

        def execute_and_bind(module: types.ModuleType) -> None:
            execute(module)
            _bind(module)

        spec.loader.exec_module = execute_and_bind  # type: ignore[method-assign]
        return spec
