import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.vocab import encoder
from megatron_adapt.vocab.encoder import check_encoder, encode_by_mean
from tests.helpers.tiny import write_llama

TEXTS = ["dog", " the dog", "a longer text of many words", "", "dog"]


def write_bert(folder):
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "dog", "the", "a", "text", "of"]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return folder


def write_encoder(folder, kind):
    return write_bert(folder) if kind == "bert" else write_llama(folder)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_vector_is_the_mean_of_the_last_states_of_its_text_whatever_is_in_the_batch(tmp_path, kind, monkeypatch):
    folder = write_encoder(tmp_path / kind, kind)
    monkeypatch.setattr(encoder, "_BATCH_TEXTS", 3)
    monkeypatch.setattr(encoder, "_MOST_TOKENS", 6)
    check_encoder(str(folder))
    found = encode_by_mean(str(folder), TEXTS)
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for text, row in zip(TEXTS, found, strict=True):
        ids = tokenizer(text)["input_ids"][:6]
        with torch.inference_mode():
            alone = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert torch.allclose(row, alone, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_a_folder_that_is_no_encoder_is_refused(tmp_path):
    message = r"vocab\.encoder: .*none cannot be loaded \(.*\); name a folder that transformers saved, or a name it"
    for load in (check_encoder, lambda name: encode_by_mean(name, ["a"])):
        with pytest.raises(ConfigError, match=message):
            load(str(tmp_path / "none"))
    no_weights = write_bert(tmp_path / "none")
    (no_weights / "model.safetensors").unlink()
    check_encoder(str(no_weights))
    with pytest.raises(ConfigError, match=message):
        encode_by_mean(str(no_weights), ["a"])


def test_an_encoder_that_gives_nan_is_refused_with_the_text(tmp_path):
    folder = write_bert(tmp_path / "bert")
    model = BertModel.from_pretrained(folder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[4] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(DataError, match=r"vocab\.encoder: .*bert gives NaN or infinity for 'dog'; name another"):
        encode_by_mean(str(folder), ["the", "dog"])
