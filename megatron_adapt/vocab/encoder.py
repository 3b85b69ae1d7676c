"""Vectors of texts by a Hugging Face text encoder: the mean of its last hidden states over the tokens of a text.

Reads: a folder, or a name that transformers finds. The special tokens that the encoder's tokenizer adds count too, as
in sentence-transformers. Costs: a forward pass for each token text, in batches of 256 texts of about the same length,
in fp32 on the CPU; memory of the encoder and of one batch.
"""

from collections.abc import Sequence

import torch

from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.logs import show_progress

_BATCH_TEXTS, _MOST_TOKENS = 256, 64


def check_encoder(name: str) -> None:
    """Look whether there is such an encoder; its weights are not read.

    Raises:
        ConfigError: transformers finds none, or does not know it.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoConfig.from_pretrained(name)
        AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever the library stumbles over
        raise _refuse(name, error) from None


def encode_by_mean(name: str, texts: Sequence[str]) -> torch.Tensor:
    """Encode texts.

    Args:
        name: folder or name of the encoder.
        texts: cut off behind 64 tokens; one that gives no tokens has no vector.

    Returns:
        Vectors [n, columns], fp32; zeros for a text that has none.

    Raises:
        ConfigError: the encoder cannot be loaded.
        DataError: it gives NaN or infinity.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
    except Exception as error:  # whatever the library stumbles over
        raise _refuse(name, error) from None
    ids = [item[:_MOST_TOKENS] for item in tokenizer(list(texts), truncation=False)["input_ids"]]
    order = sorted((at for at in range(len(ids)) if ids[at]), key=lambda at: len(ids[at]))
    pad = tokenizer.pad_token_id or 0
    rows_ND = torch.zeros(len(texts), model.config.hidden_size)
    with torch.inference_mode(), show_progress(f"encoding token texts by {name}", len(order), "texts") as advance:
        for start in range(0, len(order), _BATCH_TEXTS):
            some = order[start : start + _BATCH_TEXTS]
            longest = len(ids[some[-1]])
            input_ids = torch.tensor([ids[at] + [pad] * (longest - len(ids[at])) for at in some])
            lengths = torch.tensor([len(ids[at]) for at in some])
            mask = (torch.arange(longest) < lengths[:, None]).long()
            states = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
            rows_ND[some] = (states * mask[..., None]).sum(1) / lengths[:, None]
            advance(len(some))
    is_finite_N = rows_ND.isfinite().all(-1)
    if not is_finite_N.all():
        text = texts[int((~is_finite_N).nonzero()[0, 0])]
        raise DataError(f"vocab.encoder: {name} gives NaN or infinity for {text!r}; name another encoder")
    return rows_ND


def _refuse(name: str, error: Exception) -> ConfigError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ConfigError(
        f"vocab.encoder: {name} cannot be loaded ({reason}); name a folder that transformers saved, or a name it finds"
    )
