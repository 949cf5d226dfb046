"""The settings of a model: the fields of its JSON files that backmerge reads, validated."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from backmerge.errors import CheckpointError

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer_config.json"
SHOWN = 3  # faults of a file that are listed; the rest are counted
MAX_LAYERS = 10_000  # far above any model: a larger number is damage, and building it would take hours

# strict, as in transformers: a number in quotes is refused
Count = Annotated[int, Field(ge=0, strict=True)]
Size = Annotated[int, Field(ge=1, strict=True)]
Finite = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=-1)]  # some configs write -1 for "none"
TokenIds = TokenId | list[TokenId] | None
Token = str | dict[str, Any] | None


HUB_FOLDER = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
LINKED = (".safetensors", ".json", ".jinja", ".model", ".txt")


def check_links(directory: Path) -> None:
    """Refuse a folder with broken links, such as those of a hub cache whose blobs were removed.

    Raises:
        CheckpointError: names the link and its target.
    """
    links = (file for file in sorted(directory.iterdir()) if file.is_symlink() and file.suffix in LINKED)
    dead = next((link for link in links if not link.exists()), None)
    if dead is None:
        return
    hub = HUB_FOLDER.fullmatch(directory.parent.parent.name) if directory.parent.name == "snapshots" else None
    raise CheckpointError(
        f"{dead} is a link to {dead.readlink()}, which does not exist",
        remedy=f"the hub's cache is incomplete: `hf download {hub['owner']}/{hub['name']}` downloads the missing files."
        if hub
        else "restore the file that it points to, or replace the link by the file.",
    )


def check_unquantised(directory: Path, config: ModelConfig, purpose: str) -> None:
    """Refuse a model with packed numbers: it cannot be averaged or trained, and cannot take an adapter's change.

    Args:
        directory: The model's folder.
        config: Its `config.json`.
        purpose: What the model is needed for: "merged", "trained".

    Raises:
        CheckpointError: it is quantised; the message says how.
    """
    if config.quantization_config is None:
        return
    how = config.quantization_config.quant_method or "a method that config.json does not name"
    raise CheckpointError(
        f"{directory} is quantised ({how}), and quantised weights cannot be {purpose}",
        remedy="give the unquantised original (bfloat16, float16 or float32), or load this one with transformers, "
        "dequantise it, and save it"
        + ("; finetune.lora.quantize loads that in 4 bits for training." if purpose == "trained" else "."),
    )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a model's directory.

    Raises:
        CheckpointError: the file is missing, is nested too deeply, or is not a JSON object.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise CheckpointError(
            f"{file} is nested too deeply to be read", remedy="the file is damaged: download it again."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}", remedy="download or save the model again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not a JSON object", remedy="download or save the model again.")
    return values


class _File(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class Quantization(_File):
    """How a model's tensors are quantised.

    Attributes:
        quant_method: Such as `bitsandbytes`, `gptq`, `awq`, `fp8`, `mxfp4`.
    """

    quant_method: str | None = None


# types of rotary positions in transformers; `su` and `mrope` are in configs of earlier versions
ROPE_TYPES = {"default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "su", "mrope"}


class Rope(_File):
    """How a model's rotary positions are computed."""

    rope_type: str | None = None
    type: str | None = None


class TextConfig(_File):
    """The settings of a language model, at the top of a configuration or under `text_config`."""

    model_type: str | None = None
    vocab_size: Count | None = None
    hidden_size: Size | None = None
    intermediate_size: Count | list[Count] | None = None
    num_attention_heads: Size | list[Count] | None = None
    num_key_value_heads: Size | list[Count] | None = None
    v_head_dim: Count | None = None
    head_dim: Count | None = None
    num_hidden_layers: Annotated[int, Field(ge=0, le=MAX_LAYERS, strict=True)] | None = None
    rms_norm_eps: Finite | None = None
    layer_norm_eps: Finite | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    max_position_embeddings: Finite | None = None
    tie_word_embeddings: bool | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    eos_token_id: TokenIds = None
    bos_token_id: TokenIds = None
    pad_token_id: TokenId | None = None

    @field_validator("head_dim")
    @classmethod
    def _has_size(cls, size: int | None, info: ValidationInfo) -> int | None:
        if size == 0 and not info.data.get("v_head_dim"):
            raise ValueError("must be at least 1 unless v_head_dim gives the size of the values")
        return size

    @property
    def rope_type(self) -> str | None:
        """The type of rotary positions; `None` if the config does not say, or says it for each type of layer."""
        ropes = [rope for rope in (self.rope_parameters, self.rope_scaling) if rope is not None]
        return next((kind for rope in ropes for kind in (rope.rope_type, rope.type) if kind is not None), None)


class ModelConfig(TextConfig):
    """A model's `config.json`.

    Attributes:
        text_config: The language model's part, for models that also process images or sound.
        quantization_config: Present if the tensors are quantised.
    """

    architectures: list[str] | None = None
    text_config: TextConfig | None = None
    quantization_config: Quantization | None = None

    @property
    def text(self) -> TextConfig:
        """The language model's part."""
        return self.text_config or self


class GenerationSettings(_File):
    """A model's `generation_config.json`."""

    eos_token_id: TokenIds = None
    bos_token_id: TokenIds = None
    pad_token_id: TokenId | None = None


class NamedTemplate(_File):
    """One of several chat templates."""

    name: str
    template: str


class TokenizerConfig(_File):
    """A model's `tokenizer_config.json`."""

    tokenizer_class: str | None = None
    chat_template: str | list[NamedTemplate] | dict[str, str] | None = None
    bos_token: Token = None
    eos_token: Token = None
    pad_token: Token = None
    unk_token: Token = None
    model_max_length: float | None = None
    added_tokens_decoder: dict[str, dict[str, Any] | str] | None = None


SETTINGS: Mapping[str, type[_File]] = {
    CONFIG: ModelConfig,
    GENERATION: GenerationSettings,
    TOKENIZER: TokenizerConfig,
}
_Kind = TypeVar("_Kind", bound=_File)


def check_rope(config: Path, base: Path) -> None:
    """Refuse a tuned model's config whose rotary positions have a type that neither transformers nor its base knows.

    Raises:
        CheckpointError: no library would load a model with that config.
    """
    ours, known = (_validated(ModelConfig, file).text.rope_type for file in (config, base))
    if ours is not None and ours not in ROPE_TYPES | {known}:
        raise CheckpointError(
            f"{config}: transformers has no rope_type '{ours}', so it cannot load a model with this config",
            remedy="correct the file, or keep the base's (--config-from base) if the training did not change it.",
        )


def read_config(directory: Path) -> ModelConfig:
    """Read a model's `config.json`.

    Raises:
        CheckpointError: it is missing, is not JSON, or a field has a value of the wrong kind.
    """
    return _validated(ModelConfig, directory / CONFIG)


def check_settings(directory: Path) -> None:
    """Validate all of a model's JSON settings before a library reads them.

    Raises:
        CheckpointError: one is not JSON, or a field has a value of the wrong kind; names file and field.
    """
    for name in SETTINGS:
        if (directory / name).is_file():
            check_file(name, directory / name)


def check_file(name: str, file: Path) -> None:
    """Validate a file that a model's folder has under a name; names without settings are accepted.

    Raises:
        CheckpointError: see `check_settings`.
    """
    if name in SETTINGS:
        _validated(SETTINGS[name], file)


def _validated(kind: type[_Kind], file: Path) -> _Kind:
    try:
        return kind.model_validate(read_json(file))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise CheckpointError(
            f"{file} has invalid settings: {'; '.join(faults[:SHOWN])}{more}",
            remedy="the file is damaged or was edited by hand: download or save it again.",
        ) from error
