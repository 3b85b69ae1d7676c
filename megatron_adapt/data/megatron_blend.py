"""megatron-core's own blend of the same token files, for runs that must repeat an older one.

Reads: a plan, for its shares, seed and number of windows; the token files of its sources. Writes: the index files of
``BlendedMegatronDatasetBuilder``, in ``cache``. Everything is as megatron-core does it: shares are weights of samples
in floating point, documents are shuffled jointly over all epochs but the last, and another length of the run is another
order. What it repeats, and how far it is from the plan, is its own affair; ``BlendedWindows`` is the project's answer.

Costs: rank 0 builds the index files before the first step (minutes for billions of tokens), 10 bytes a window each.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from numpy.typing import NDArray

from megatron_adapt.data.dataset import Batch
from megatron_adapt.data.plan import BlendPlan
from megatron_adapt.data.sources import open_sources
from megatron_adapt.errors import ConfigError


class _Tokenizer(NamedTuple):
    """What the builder asks of a tokenizer."""

    vocab_size: int
    eod: int
    pad: int
    unique_identifiers: dict[str, str]


class MegatronWindows:
    """The windows of a plan's sources as ``BlendedMegatronDatasetBuilder`` orders them."""

    def __init__(self, plan: BlendPlan, prefixes: Mapping[str, Path], cache: Path) -> None:
        """Check the sources of a plan; the order is built when the first window is read.

        Args:
            plan: its sources in the shares of their windows, its seed and its number of windows.
            prefixes: prefix of the token files of each source.
            cache: folder for the builder's index files, used where torch.distributed is initialised.

        Raises:
            ConfigError: the plan begins where another stage stopped, or a source has prompts or documents of
                several sentences, which this order cannot.
            DataError: as ``open_sources``.
        """
        if plan.aligned:
            raise ConfigError("train.blend_engine: megatron cuts documents anywhere; leave out train.align_documents")
        begun = [source for source, first in zip(plan.sources, plan.first, strict=True) if first]
        if begun:
            raise ConfigError(
                f"train.blend_engine: megatron begins every source anew, and {', '.join(begun)} was read by the stages "
                "before; set continue_blend = false for this stage"
            )
        self.plan = plan
        self.sources = open_sources(plan, prefixes)
        with_prompts = [name for name, source in self.sources.items() if source.prompts_D is not None]
        if with_prompts:
            raise ConfigError(
                f"train.blend_engine: megatron trains on prompts too, and {', '.join(with_prompts)} has some; use adapt"
            )
        cut = [name for name, item in self.sources.items() if item.file.num_sequences != item.file.num_documents]
        if cut:
            raise ConfigError(
                "train.blend_engine: megatron shuffles sentences apart where documents are cut into them "
                f"(--split-sentences), as in {', '.join(cut)}; use adapt"
            )
        read = zip(plan.sources, plan.windows, strict=True)
        self._prefixes = [str(prefixes[source]) for source, count in read if count]
        self._cache = cache
        self._built: Any = None

    def __len__(self) -> int:
        return self.plan.num_windows

    def read_windows(self, first: int, count: int) -> Batch:
        """Read windows as ``BlendedWindows.read_windows`` does."""
        dataset = self._build()
        items = [dataset[place] for place in range(first, first + count)]
        rows = [torch.cat([item["tokens"], item["labels"][-1:]]).numpy() for item in items]
        ids_NT1 = np.stack(rows)
        sources_N = self._sources_of(dataset.dataset_index[first : first + count])
        return Batch(ids_NT1, sources_N, np.ones_like(ids_NT1[:, 1:], bool))

    def count_before(self, place: int) -> NDArray[np.int64]:
        """Count the windows of each source before ``place``, ``[K]``."""
        sources_N = self._sources_of(self._build().dataset_index[:place])
        return np.bincount(sources_N, minlength=len(self.plan.sources))

    def _sources_of(self, index_N: NDArray[np.int16]) -> NDArray[np.int64]:
        return np.flatnonzero(self.plan.windows)[index_N]

    def _build(self) -> Any:
        """Build the order, on every rank together where there are several."""
        if self._built is None:
            one = next(iter(self.sources.values())).record
            identifiers = {"fingerprint": one.tokenizer_fingerprint}
            shares = [float(count) for count in self.plan.windows if count]
            config = GPTDatasetConfig(
                random_seed=self.plan.seed,
                sequence_length=self.plan.seq_length,
                blend=(self._prefixes, shares),
                split="1,0,0",
                path_to_cache=str(self._cache) if torch.distributed.is_initialized() else None,
                # Windows are full, so nothing is padding; a token taken for it would lose its id.
                tokenizer=_Tokenizer(one.vocab_size, eod=-1, pad=-1, unique_identifiers=identifiers),
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=False,
            )
            # What the loss and the attention make of documents is decided in train, for both orders alike.
            builder = BlendedMegatronDatasetBuilder(GPTDataset, [len(self), 0, 0], lambda: True, config)
            self._built = builder.build()[0]
        return self._built
