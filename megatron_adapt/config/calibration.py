"""Settings of self-calibration."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_adapt.config.require import require

OUTPUT_ENDING = ".jsonl.zst"


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """How prompts are answered."""

    max_new_tokens: int = 1024
    "Longest answer; an answer that does not end within it is left out."
    temperature: float = 0.0
    "0 takes the likeliest token each time; above it answers are drawn."
    seed: int = 1234
    "Of what is drawn."
    batch_size: int = 8
    "Prompts answered at a time: rows of a batch of the model, or requests to the server."
    timeout_seconds: float = 600.0
    "How long to wait for one answer of the server."

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            require(getattr(self, name) >= 1, f"calibration.{name}: {getattr(self, name)} is below 1; use 1 or more")
        for name in ("temperature", "seed"):
            require(getattr(self, name) >= 0, f"calibration.{name}: {getattr(self, name)} is below 0; use 0 or more")
        require(
            self.timeout_seconds > 0, f"calibration.timeout_seconds: {self.timeout_seconds} is not above 0; use 600"
        )


@dataclass(frozen=True, kw_only=True)
class MakeCalibration:
    """Let an instruct model answer prompts; the pairs train its adapted version to speak as before."""

    prompts: tuple[Path, ...]
    """Files, folders or patterns, in this order: JSON lines or parquet, a document with the key prompt (a text) or
    messages (a chat, [{"role": ..., "content": ...}, ...], that ends before the answer)."""
    output: Path
    "File to write, NAME.jsonl.zst: documents for tools/preprocess_data.py --prompt-key prompt."
    model: Path | None = None
    "Hugging Face folder of the instruct model, which answers here."
    server: str | None = None
    "URL of a server that answers POST /v1/chat/completions, such as http://127.0.0.1:8000."
    server_model: str = ""
    "Name that the server knows the model by; by default the first that it lists."
    tokenizer: Path | None = None
    "With --server: folder with the tokenizer and chat template of the model that answers."
    overwrite: bool = False
    "Replace the output if it exists, and an unfinished run with other settings."
    settings: CalibrationSettings = field(default_factory=CalibrationSettings)

    def __post_init__(self) -> None:
        require((self.model is None) != (self.server is None), "--model, --server: name one of the two that answers")
        require(
            self.server is None or self.server.startswith(("http://", "https://")),
            f"--server: {self.server} is no URL; write http://HOST:PORT",
        )
        require(
            self.server is None or self.tokenizer is not None,
            "--tokenizer: missing; name the folder with the chat template of the model that the server runs",
        )
        for flag, value in (("--tokenizer", self.tokenizer), ("--server-model", self.server_model)):
            require(self.model is None or not value, f"{flag}: has no effect with --model; leave it out")
        require(
            self.output.name.endswith(OUTPUT_ENDING),
            f"--output: {self.output} does not end in {OUTPUT_ENDING}, which it will be; name it so",
        )
