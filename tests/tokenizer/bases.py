"""Made-up languages in three scripts, and small tokenizers of both families learned from the English one."""

import json
import random
from pathlib import Path

import orjson
from tokenizers import AddedToken, Tokenizer

from megatron_adapt.tokenizer.learn import learn_base_tokenizer
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, copy_tokenizer, read_tokenizer

SYLLABLES = {
    "en": "the in ker lo ma pro tion re sta ble con ver si on an der ing ful".split(),
    "ru": "пре во да ние сть ко мо гра ло ви тель на ши ро ка зы".split(),
    "ja": "の は 日本 語 で す 学 東京 ます カタ カナ を た 見 食べ 々".split(),
    "ar": "ال كت اب مد رس ة في من عل ى قا ل و هم ذه".split(),
}
SCRIPTS = {"ru": ("Cyrillic",), "ja": ("Han", "Hiragana", "Katakana"), "ar": ("Arabic",)}
"What the languages beside English are written in."
KINDS = ("byte_level", "sentencepiece")
CHAT, TOOL = "<|chat|>", "[tool]"
TEMPLATE = "{{ bos_token }}{% for message in messages %}<|chat|>{{ message.content }}{% endfor %}"
ODD_TEXTS = [
    "",
    " ",
    "\n\n\n",
    "\t tab\r\n",
    "👩‍👩‍👧 🏳️‍🌈 emoji 👍🏽",
    "e\u0301 cafe\u0301 か\u3099 がぎ",
    "می‌خواهم\u200c \u200d",
    "▁ a▁b ▁▁",
    "the " * 50 + "x" * 5000,
    "日" * 3000,
    "１２３ 12345 ٣٤٥",
    "<0x41> <s> </s> <unk>"[:7],
    "\x00\x01\x7f\u00a0\u3000",
    "𝒜𝓁𝓅𝒽𝒶 𠮷野家",
    "mixed日本語textとабв",
]


def make_texts(language: str, num_texts: int = 150, seed: int = 0) -> list[str]:
    """Make documents of made-up words; frequent ones come often, as in real text."""
    rng = random.Random(f"{language}{seed}")
    words = ["".join(rng.choices(SYLLABLES[language], k=rng.randint(1, 4))) for _ in range(300)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    texts = []
    for _ in range(num_texts):
        chosen = rng.choices(words, weights, k=rng.randint(5, 40))
        texts.append(("" if language == "ja" else " ").join(chosen) + rng.choice([".", "!\n", "。", " 2024\n\n"]))
    return texts


MIXED = [*ODD_TEXTS, *(text for language in (*SCRIPTS, "en") for text in make_texts(language, 20, seed=7))]


def write_corpus(path: Path, texts: list[str]) -> Path:
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    return path


def learn_base(folder: Path, kind: str, vocab_size: int = 420) -> LoadedTokenizer:
    learn_base_tokenizer(make_texts("en", 400), vocab_size, kind, folder)
    return read_tokenizer(folder)


def write_chat_base(base: LoadedTokenizer, folder: Path) -> LoadedTokenizer:
    """Copy a base, with a special and a plain token behind its pieces and a chat template that names the first."""
    copy_tokenizer(base.folder, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(CHAT, normalized=False, special=True)])
    tokenizer.add_tokens([AddedToken(TOOL, normalized=False, lstrip=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return read_tokenizer(folder)


def edit_json(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
