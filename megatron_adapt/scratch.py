"""A small base model from scratch: a new tokenizer and random weights, for demos and tests.

Reads: documents of the old language. Writes: a Hugging Face folder (config, safetensors in fp32, tokenizer) that
the rest of the pipeline takes for any other pretrained model; ``tools/pretrain.py`` then teaches it the language.
Guarantees: the same corpus, settings and library versions give the same folder, bit for bit.
"""

import logging

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_adapt.config import BaseSettings, CreateBase
from megatron_adapt.corpus.documents import read_texts
from megatron_adapt.errors import ConfigError
from megatron_adapt.files import STAGE_FILE, replace_folder, require_file, write_stage
from megatron_adapt.tokenizer.learn import learn_base_tokenizer
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, read_tokenizer

_logger = logging.getLogger(__name__)


def create_base(config: CreateBase) -> None:
    """Learn a tokenizer from ``config.corpus`` and write it with a random model to ``config.output``.

    Raises:
        ConfigError: the shape is impossible, or the output exists and ``overwrite`` is off.
        DataError: the corpus is missing, damaged or too small for the vocabulary.
    """
    settings = config.settings
    _check_heads(settings)
    for path in config.corpus:
        require_file(path, "--corpus")
    with replace_folder(config.output, overwrite=config.overwrite) as folder:
        texts = read_texts(config.corpus, config.text_key)
        learn_base_tokenizer(texts, settings.vocab_size, settings.tokenizer_kind, folder)
        tokenizer = read_tokenizer(folder)
        model = make_random_llama(settings, tokenizer)
        model.save_pretrained(folder)
        counts = {"vocab_size": tokenizer.vocab_size, "parameters": model.num_parameters()}
        write_stage(folder / STAGE_FILE, config=config, inputs=config.corpus, counts=counts)
    _logger.info(
        "%s: %s pieces, %.2f million parameters, random weights of seed %d",
        config.output,
        f"{tokenizer.vocab_size:,}",
        counts["parameters"] / 1e6,
        settings.seed,
    )


def make_random_llama(settings: BaseSettings, tokenizer: LoadedTokenizer) -> LlamaForCausalLM:
    """Return an fp32 Llama with a row for every id of the tokenizer and transformers' initial weights.

    The process's own random state is left as it was.
    """
    shape = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.ffn_hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_query_groups,
        max_position_embeddings=settings.max_position_embeddings,
        tie_word_embeddings=settings.tied,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(shape)


def _check_heads(settings: BaseSettings) -> None:
    heads, groups = settings.num_attention_heads, settings.num_query_groups
    if settings.hidden_size % heads or settings.hidden_size // heads % 2:
        raise ConfigError(
            f"base.hidden_size: {settings.hidden_size} does not give {heads} heads an even width; "
            f"use a multiple of {2 * heads}"
        )
    if heads % groups:
        raise ConfigError(
            f"base.num_query_groups: {groups} does not divide num_attention_heads {heads}; use a divisor of it"
        )
