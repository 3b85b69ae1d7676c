"""Products of the layers in FP8, which are Transformer Engine's: whether this machine has them.

The settings go to megatron-core as they are. Recipes compute their scales from what they scale, step by step, so that a
resumed run goes on exactly; what a recipe takes of the GPU is Transformer Engine's own rule (``fp8.py``,
``check_*_support``). Micikevicius et al. 2022, arXiv 2209.05433. Not run here for want of such a GPU.
"""

import torch
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

from megatron_adapt.config import Layout
from megatron_adapt.errors import EngineError

_CAPABILITIES = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"Lowest compute capability that a recipe runs on."


def check_fp8(layout: Layout) -> None:
    """Refuse FP8 where it does not run.

    Raises:
        EngineError: Transformer Engine is not installed, or there is no GPU that has FP8.
    """
    if layout.fp8 == "none":
        return
    if not HAVE_TE:
        raise EngineError(
            f'train.fp8: "{layout.fp8}" runs in Transformer Engine, which is not installed here; install the extra gpu '
            '(pip install "megatron_adapt[gpu]"), or use "none"'
        )
    needed = _CAPABILITIES[layout.fp8_recipe]
    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if found is None or found < needed:
        here = "there is no GPU" if found is None else f"the GPU has {_show(found)}"
        raise EngineError(
            f'train.fp8: "{layout.fp8}" with recipe "{layout.fp8_recipe}" needs a GPU of compute capability '
            f'{_show(needed)}, and {here}; run it on one that has, or use "none"'
        )


def _show(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
