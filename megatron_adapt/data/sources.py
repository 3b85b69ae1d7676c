"""The token files of a blend, checked against each other and against the plan.

Guarantees: all come from one tokenizer; each holds as many windows as the plan counted. Records and sizes are compared
at once; the files of a source are opened when it is read for the first time, so that a start does not wait for all of
a thousand sources. ``inspect_data doctor`` looks into files before a run.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_adapt.data.align import cut_documents
from megatron_adapt.data.index import TokensFile, bin_path, check_size, read_tokens
from megatron_adapt.data.plan import BlendPlan
from megatron_adapt.data.prompts import read_prompts
from megatron_adapt.data.record import TokensRecord, data_fingerprint, read_record
from megatron_adapt.data.windows import EpochOrder, count_windows
from megatron_adapt.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of a blend.

    What is read from its files raises DataError where they are missing, damaged or not those of the plan.
    """

    prefix: Path
    "Prefix of its token files."
    record: TokensRecord
    "Their counts."
    prompts_D: NDArray[np.int32] | None
    "Prompt tokens of each document, where any has some."
    available: int
    "Windows of an epoch, as the plan counted them."
    seq_length: int
    "Tokens to predict in a window."
    aligned: bool
    "Windows begin where documents begin."
    seed: int
    "Seed of the run."

    @functools.cached_property
    def file(self) -> TokensFile:
        """The mapped ids."""
        file = read_tokens(self.prefix)
        file.expect_random_reads()
        return file

    @functools.cached_property
    def starts_D1(self) -> NDArray[np.int64]:
        """First token of each document, and the number of tokens."""
        return self.file.starts()

    @functools.cached_property
    def cuts_W1(self) -> NDArray[np.int64] | None:
        """First token of each window and the last token, of windows that begin where documents begin."""
        if not self.aligned:
            return None
        cuts_W1 = cut_documents(self.starts_D1, self.seq_length)
        _check_windows(self, len(cuts_W1) - 1)
        return cuts_W1

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the data, which decides the order of the windows."""
        return data_fingerprint(self.prefix)

    @functools.cached_property
    def order(self) -> EpochOrder:
        """The endless order of the windows."""
        # Of aligned windows only the number counts here; where they begin is in the table of cuts.
        return EpochOrder(
            num_tokens=self.available + 1 if self.aligned else self.record.tokens,
            seq_length=1 if self.aligned else self.seq_length,
            fingerprint=self.fingerprint,
            seed=self.seed,
        )


def open_sources(plan: BlendPlan, prefixes: Mapping[str, Path]) -> dict[str, Source]:
    """Find the sources of a plan, in its order.

    Args:
        plan: windows per source.
        prefixes: prefix of the token files of each source.

    Raises:
        ConfigError: a source of the plan has no prefix.
        DataError: files are missing or cut off, do not fit the plan, or come from different tokenizers.
    """
    sources: dict[str, Source] = {}
    for name, available in zip(plan.sources, plan.available, strict=True):
        if name not in prefixes:
            raise ConfigError(f"blend.{name}: no token files were named; tokenise the source first")
        prefix, record = prefixes[name], read_record(prefixes[name])
        check_size(prefix, record.tokens)
        source = sources[name] = Source(
            prefix=prefix,
            record=record,
            prompts_D=read_prompts(prefix, record.documents),
            available=available,
            seq_length=plan.seq_length,
            aligned=plan.aligned,
            seed=plan.seed,
        )
        if not plan.aligned:
            _check_windows(source, count_windows(record.tokens, plan.seq_length))
    check_tokenizers({source.prefix: source.record for source in sources.values()})
    return sources


def _check_windows(source: Source, windows: int) -> None:
    if windows != source.available:
        raise DataError(
            f"{bin_path(source.prefix)}: {windows} windows of {source.seq_length} tokens where the plan counted "
            f"{source.available}; the data changed, make the plan again"
        )


def check_tokenizers(records: Mapping[Path, TokensRecord]) -> str:
    """Return the fingerprint of the tokenizer that made all of these token files.

    Raises:
        DataError: two of them come from different tokenizers.
    """
    (one, first), *others = records.items()
    for other, record in others:
        if record.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise DataError(
                f"{bin_path(other)}: made by tokenizer {record.tokenizer_fingerprint}, but {bin_path(one)} by "
                f"{first.tokenizer_fingerprint}; tokenise both with the same one"
            )
    return first.tokenizer_fingerprint
