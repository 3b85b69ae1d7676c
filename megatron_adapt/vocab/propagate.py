"""Give an instruct model the vocabulary that its base model learned: Learned Embedding Propagation (arXiv 2412.21140).

Reads: Hugging Face folders of the base model, of the adapted base (new tokenizer, rows learned with it) and of the
instruct model made from the base. Writes: the instruct model with the new tokenizer, to be used or calibrated
(``evaluate/calibration.py``). Guarantees: the body is the instruct model's, byte by byte; rows and ids of the tokens
that the instruct model added are its own, and so are chat template and roles; input matrix and output head are mapped
each by its own fit, a tied model has one; a value that is not finite is refused; killed and started again, it goes on
behind what is done and ends with the same bytes.

1. ``_open`` reads the three models; ``_check_bodies`` and ``plan_vocab`` refuse what does not belong together.
2. ``fit_propagation`` fits the map of a matrix from the base's rows onto the instruct model's (``propagate_fit``).
3. ``_write_matrix`` writes adapted rows through the map, and rows of the instruct model's own tokens as they are.
4. All other tensors are copied slice by slice; ``--body-delta`` adds a share of adapted minus base (task arithmetic,
   arXiv 2212.04089), as is due where training changed more than the vocabulary.

Costs: per matrix three products of tokens x H x H in fp64 and one eigenvalue decomposition; memory of a fit
(``propagate_fit``).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_adapt.checkpoint import slices
from megatron_adapt.checkpoint.companions import check_import_vocab, write_companions
from megatron_adapt.checkpoint.estimate import count_hf_bytes, write_estimate
from megatron_adapt.checkpoint.hf import HFFolder, HFWriter, count_shards, read_config, read_hf_shape
from megatron_adapt.checkpoint.layout import EMBEDDING, HEAD, check_hf_tensors
from megatron_adapt.checkpoint.parts import Part, cut_rows, write_model
from megatron_adapt.checkpoint.resume import PartialFolder, continue_folder, fingerprint_plan
from megatron_adapt.checkpoint.values import TensorSpec, list_row_blocks
from megatron_adapt.config import PropagateEmbeddings, PropagateSettings
from megatron_adapt.errors import CheckpointError, DataError
from megatron_adapt.files import STAGE_FILE, write_stage
from megatron_adapt.shape import LlamaShape
from megatron_adapt.tokenizer.id_map import MAP_FILE, IdMap, map_ids, read_id_map
from megatron_adapt.tokenizer.pieces import JSON_FILE, LoadedTokenizer, read_tokenizer
from megatron_adapt.vocab.fit import check_fit, renumber_companions
from megatron_adapt.vocab.propagate_fit import NUM_SQUARES, Propagation, fit_propagation, list_equations
from megatron_adapt.vocab.propagate_tokens import ResultVocab, plan_vocab, write_vocab
from megatron_adapt.vocab.resize import list_specs
from megatron_adapt.vocab.rows import CHUNK_ROWS

_MATRICES = (EMBEDDING, HEAD)
_ADDED_FILE = "added_tokens.json"
_COMPARED_BYTES = 1 << 16
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Model:
    """A Hugging Face folder with its tokenizer."""

    source: HFFolder
    shape: LlamaShape
    tokenizer: LoadedTokenizer

    @property
    def folder(self) -> Path:
        return self.source.folder

    @property
    def body(self) -> dict[str, tuple[int, ...]]:
        return {name: self.source.shape(name) for name in self.source.names if name not in _MATRICES}

    def gather(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        """Return the rows of ids; refuse what is not finite."""
        rows_NH = self.source.gather_rows(name, ids)
        is_finite_N = rows_NH.isfinite().all(-1)
        if not is_finite_N.all():
            index = ids[int((~is_finite_N).nonzero()[0, 0])]
            token = self.tokenizer.tokenizer.id_to_token(index)
            raise CheckpointError(
                f"{self.folder}: row {index} ({token!r}) of {name} holds NaN or infinity; use an earlier checkpoint"
            )
        return rows_NH


@dataclass(frozen=True)
class _Job:
    """The three models, and what is made of them."""

    base: _Model
    adapted: _Model
    instruct: _Model
    vocab: ResultVocab
    settings: PropagateSettings
    specs: dict[str, TensorSpec]


def propagate_embeddings(config: PropagateEmbeddings) -> None:
    """Write the adapted instruct model.

    Raises:
        CheckpointError: a model is incomplete or damaged, or the three do not belong together.
        ConfigError: a model is not supported, the output exists, or there is too little space.
        DataError: a folder holds no tokenizer, or not all of it.
    """
    base, adapted, instruct = (_open(folder) for folder in (config.base, config.adapted, config.instruct))
    _check_bodies(base, adapted, instruct)
    id_map = _read_map(base, adapted)
    vocab = plan_vocab(base.tokenizer, adapted.tokenizer, instruct.tokenizer, id_map)
    job = _Job(
        base, adapted, instruct, vocab, config.settings, list_specs(instruct.source, instruct.shape, vocab.vocab_size)
    )
    files = [*base.source.files, *adapted.source.files, *instruct.source.files]
    num_bytes, shape = count_hf_bytes(job.specs), instruct.shape
    if config.dry_run:
        squares = 0 if config.settings.method == "swap" else NUM_SQUARES * 8 * shape.hidden_size**2
        write_estimate(
            f"{config.instruct} to {vocab.vocab_size} tokens",
            files,
            config.output,
            overwrite=config.overwrite,
            num_bytes=num_bytes,
            num_files=count_shards(job.specs),
            work_bytes=squares + 4 * 8 * CHUNK_ROWS * shape.hidden_size,
        )
        return
    _warn_of_changes(job)
    prints = [model.tokenizer.fingerprint for model in (base, adapted, instruct)]
    read = [*files, *(path for path in [adapted.folder / MAP_FILE] if path.is_file())]
    plan = fingerprint_plan("propagate", shape, prints, config.settings, slices.SLICE_BYTES, files=read)
    with continue_folder(config.output, overwrite=config.overwrite, plan=plan, num_bytes=num_bytes) as partial:
        _write_weights(job, partial)
        hf_config = {**read_config(config.instruct), "vocab_size": vocab.vocab_size}
        write_companions(partial.folder, config=hf_config, source=config.instruct, tokenizer=None)
        renumber_companions(partial.folder, vocab.map_to_instruct())
        write_vocab(vocab, adapted.tokenizer, instruct.tokenizer, partial.folder)
        counts = {
            "base_vocab_size": id_map.base_vocab_size,
            "vocab_size": vocab.vocab_size,
            "new_rows": len(id_map.pieces),
            "instruct_rows": len(vocab.kept),
        }
        inputs = [config.base, config.adapted, config.instruct]
        write_stage(partial.folder / STAGE_FILE, config=config, inputs=inputs, counts=counts)
    _logger.info(
        "%s: %d tokens by %s, the rows of %d from %s",
        *(config.output, vocab.vocab_size, config.settings.method, len(vocab.kept), config.instruct),
    )


def _open(folder: Path) -> _Model:
    shape = read_hf_shape(folder)
    source = HFFolder(folder)
    check_hf_tensors({name: source.shape(name) for name in source.names}, shape, str(folder))
    tokenizer = read_tokenizer(folder)
    if (folder / _ADDED_FILE).is_file() and not (folder / JSON_FILE).is_file():
        raise DataError(
            f"{folder}: has no {JSON_FILE}, and {_ADDED_FILE} alone does not say what its tokens are like; let "
            "transformers write it: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    check_import_vocab(tokenizer, shape.vocab_size, folder)
    return _Model(source, shape, tokenizer)


def _check_bodies(base: _Model, adapted: _Model, instruct: _Model) -> None:
    """Refuse models of other shapes than the base's."""
    for model in (adapted, instruct):
        said = {True: "one matrix for input and head", False: "two matrices for input and head"}
        if model.shape.tied != base.shape.tied:
            raise CheckpointError(
                f"{model.folder}: has {said[model.shape.tied]}, the base {base.folder} {said[base.shape.tied]}; name "
                "models made from this base"
            )
        for name, size in base.body.items():
            found = model.body.get(name)
            if found != size and not name.endswith("inv_freq"):
                raise CheckpointError(
                    f"{model.folder}: {name} is {found or 'missing'}, in the base {base.folder} {size}; name models "
                    "made from this base"
                )
        more = sorted(name for name in set(model.body) - set(base.body) if not name.endswith("inv_freq"))
        if more:
            raise CheckpointError(
                f"{model.folder}: {more[0]} is {model.body[more[0]]}, in the base {base.folder} missing; name models "
                "made from this base"
            )


def _read_map(base: _Model, adapted: _Model) -> IdMap:
    """Return the map beside the adapted tokenizer; where there is none from this base, what it would say."""
    own, made = base.tokenizer, adapted.tokenizer
    id_map = read_id_map(made) if (adapted.folder / MAP_FILE).is_file() else None
    if id_map is None or id_map.base_vocab_size != own.vocab_size:  # a vocabulary that was extended twice
        id_map = map_ids(own, made)
    check_fit(base.folder, base.shape.vocab_size, own, made, id_map)
    return id_map


def _warn_of_changes(job: _Job) -> None:
    """Say so where training changed the body and nothing of it is taken over; looks at a sample of every tensor."""
    if job.settings.body_delta:
        return
    num_changed = 0
    for name, size in job.base.body.items():
        spec = TensorSpec(size, torch.float32)
        blocks = list(list_row_blocks(spec, _COMPARED_BYTES))
        for start, stop in {blocks[0], blocks[len(blocks) // 2], blocks[-1]}:
            before, after = (model.source.read_rows(name, start, stop) for model in (job.base, job.adapted))
            if not torch.equal(before.float(), after.float()):
                num_changed += 1
                break
    if num_changed:
        _logger.warning(
            "%s: %d of %d tensors of its body differ from the base's, and --body-delta 0 leaves that out; 1 adds it",
            *(job.adapted.folder, num_changed, len(job.base.body)),
        )


def _write_weights(job: _Job, progress: PartialFolder) -> None:
    source, specs = job.instruct.source, job.specs
    matrices = {name: specs[name] for name in _MATRICES if name in specs}
    parts = [part for name, spec in specs.items() if name not in matrices for part in cut_rows(name, spec)]
    with HFWriter(progress.folder, specs) as writer:

        def copy_rows(part: Part, buffer: torch.Tensor) -> int:
            start, stop = part.offsets[0], part.offsets[0] + part.sizes[0]
            rows = source.read_rows(part.name, start, stop, buffer)
            low, high = rows.aminmax()  # NaN passes through both
            if not (low.isfinite() and high.isfinite()):
                raise CheckpointError(
                    f"{source.folder}: {part.name} holds NaN or infinity in rows {start} to {stop - 1}; fetch it again"
                )
            writer.write_rows(part.name, start, _add_delta(job, part.name, start, stop, rows))
            return rows.nbytes

        write_model(
            "propagating",
            writer,
            matrices=matrices,
            write_matrix=lambda name: _write_matrix(job, name, writer),
            parts=parts,
            copy_part=copy_rows,
            total_bytes=sum(spec.num_bytes for spec in specs.values()),
            progress=progress,
        )


def _add_delta(job: _Job, name: str, start: int, stop: int, rows: torch.Tensor) -> torch.Tensor:
    share = job.settings.body_delta
    if not share or name not in job.base.body or name not in job.adapted.body:
        return rows
    after, before = (model.source.read_rows(name, start, stop).double() for model in (job.adapted, job.base))
    moved = (rows.double() + share * (after - before)).to(rows.dtype)
    if not moved.isfinite().all():
        raise CheckpointError(
            f"{job.adapted.folder}: {name} minus the base's is not finite in rows {start} to {stop - 1}; use an "
            "earlier checkpoint"
        )
    return moved


def _write_matrix(job: _Job, name: str, writer: HFWriter) -> None:
    """Write all rows of a matrix, through a map of its own."""
    spec, vocab = job.specs[name], job.vocab
    found = _fit(job, name)
    for start in range(0, vocab.vocab_size, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, vocab.vocab_size)
        rows_NH = torch.empty(stop - start, *spec.shape[1:], dtype=spec.dtype)
        kept = [new for new in range(start, stop) if new in vocab.kept]
        if kept:
            rows_NH[[new - start for new in kept]] = job.instruct.gather(name, [vocab.kept[new] for new in kept])
        others = [new for new in range(start, stop) if new not in vocab.kept]
        if others:
            learned_NH = job.adapted.gather(name, others)
            mapped_NH = (learned_NH if found is None else found.apply(learned_NH)).to(spec.dtype)
            if not mapped_NH.isfinite().all():
                raise CheckpointError(f"{name}: mapped rows exceed {spec.dtype}; give the instruct model another type")
            rows_NH[[new - start for new in others]] = mapped_NH
        writer.write_rows(name, start, rows_NH)


def _fit(job: _Job, name: str) -> Propagation | None:
    if job.settings.method == "swap":
        return None
    equations = list_equations(job.vocab.id_map, job.vocab.changed, only_shared=job.settings.method == "overlap")
    if not equations:
        raise CheckpointError(
            f"{job.adapted.folder}: no token of its tokenizer is known to the base's; --method swap needs none"
        )
    where = "output head" if name == HEAD else "input matrix"
    return fit_propagation(
        lambda ids: job.base.gather(name, ids), lambda ids: job.instruct.gather(name, ids), equations, where
    )
