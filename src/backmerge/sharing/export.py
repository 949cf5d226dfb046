"""Export a merged model for llama.cpp, Ollama or MLX: run the user's own converter, and check its output."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

from backmerge import __version__
from backmerge.checkpoints.adapter import is_adapter, open_weights
from backmerge.checkpoints.adapter_config import CONFIG as ADAPTER_CONFIG
from backmerge.checkpoints.files import MERGED_DTYPES
from backmerge.checkpoints.locate import locate_model
from backmerge.checkpoints.reader import Checkpoint, read_json
from backmerge.errors import CheckpointError, ConfigError, RunError
from backmerge.generation.chat import load_tokenizer
from backmerge.merging.recipe import Variant
from backmerge.merging.rounding import rounding_line
from backmerge.merging.served import served_dtype
from backmerge.merging.to_disk import write_merged
from backmerge.outputs import check_apart
from backmerge.progress import say
from backmerge.runs import whole_directory
from backmerge.sharing.modelfile import modelfile

Target = Literal["gguf", "ollama", "mlx"]
TARGETS: tuple[Target, ...] = ("gguf", "ollama", "mlx")
RECORD = "export.json"

CONVERTER = "convert_hf_to_gguf.py"
QUANTIZER = "llama-quantize"
MLX_CONVERTER = "mlx_lm.convert"
UNROUNDED = "export `backmerge merge BASE LORA --lam 1 --as checkpoint --dtype float32` instead"
DIRECT = frozenset({"f32", "f16", "bf16", "q8_0"})  # types that the converter writes without llama-quantize
MLX_BITS = frozenset({"2", "3", "4", "5", "6", "8"})
LAST_LINES = 5  # of a tool's messages that are shown if it fails


class Tools(NamedTuple):
    """The user's own programs, found before anything is written.

    Attributes:
        converter: Its command, as words.
        quantizer: The same; empty if the type needs none.
    """

    converter: tuple[str, ...]
    quantizer: tuple[str, ...] = ()


class Exported(NamedTuple):
    """An exported model.

    Attributes:
        directory: Its folder.
        model: The model's file or folder in it.
        serve: A command that serves it.
        url: The address on which it then answers.
        has_template: Whether a Modelfile states the chat template; `None` without a Modelfile.
    """

    directory: Path
    model: Path
    serve: str
    url: str
    has_template: bool | None


def export_model(
    model: Path,
    to: Target,
    out: Path,
    *,
    name: str,
    quantize: str | None = None,
    base: str | None = None,
    llama_cpp: Path | None = None,
) -> Exported:
    """Convert a merged model, quantise it if asked, and write what serves it; whole or not at all.

    Args:
        model: A merged model's folder: a checkpoint, or an adapter, which is merged into its base first.
        to: The target program.
        out: A new folder.
        name: The model's name there.
        quantize: A quantisation type of llama.cpp, such as Q4_K_M, or the bits for MLX; by default the weights'
            own dtype.
        base: The adapter's base, if not the one that it names.
        llama_cpp: The user's copy of llama.cpp, or its converter; by default both are found on PATH.

    Raises:
        ConfigError: a tool is missing, or the type does not exist.
        CheckpointError: the model cannot be read, or the converter's output is not this model.
        RunError: a tool failed, or `out` exists.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError(f"'{name}' is not a valid name", remedy="give --name with letters, digits, '.', '-', '_'.")
    check_apart(out, [model, *([llama_cpp] if llama_cpp is not None else [])])
    tools = _mlx_tools(quantize) if to == "mlx" else _tools(quantize, llama_cpp)
    with _as_checkpoint(model, base, out) as checkpoint, whole_directory(out) as place:
        if to == "mlx":
            written = _to_mlx(checkpoint, place / name, tools, quantize)
        else:
            written = _to_gguf(checkpoint, place, name, tools, quantize)
        has_template = _write_modelfile(place, written.name, checkpoint) if to == "ollama" else None
        record = {
            "backmerge": __version__,
            "model": Checkpoint(checkpoint).fingerprint,
            "to": to,
            "quantize": quantize,
            "converter": Path(tools.converter[-1]).name,
            "sha256": {file.name: _sha256(file) for file in sorted(place.rglob("*")) if file.is_file()},
        }
        (place / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    directory = out.expanduser()
    file = directory / written.name
    if to == "mlx":
        serve, url = f"mlx_lm.server --model {shlex.quote(str(file))} --port 8080", "http://localhost:8080/v1"
    elif to == "ollama":
        serve = f"ollama create {name} -f {shlex.quote(str(directory / 'Modelfile'))}"
        url = "http://localhost:11434/v1"
    else:
        serve = f"llama-server -m {shlex.quote(str(file))} --alias {name} --port 8080"
        url = "http://localhost:8080/v1"
    return Exported(directory, file, serve, url, has_template)


@contextmanager
def _as_checkpoint(model: Path, base: str | None, out: Path) -> Iterator[Path]:
    """Yield the model as a checkpoint: an adapter is merged into its base, in a temporary folder."""
    if not is_adapter(model):
        yield model
        return
    named = base or read_json(model / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{model} is an adapter that names no base", remedy="give --base.")
    on = Checkpoint(locate_model(named))
    check_apart(out, [on.directory])
    variant = Variant(on, open_weights(model, on))
    with TemporaryDirectory(prefix="backmerge-export-") as temporary:
        directory = Path(temporary) / "model"
        say("The model is an adapter: it is merged into its base first.")
        written = write_merged(variant, directory)
        if written.rounding_loss is not None:
            say(rounding_line("The merged model", written.rounding_loss, served_dtype(variant), UNROUNDED))
        yield directory


def _tools(quantize: str | None, llama_cpp: Path | None) -> Tools:
    converter = _found(CONVERTER, llama_cpp, ("",)) or shutil.which("convert-hf-to-gguf")
    if converter is None:
        where = f"in {llama_cpp}" if llama_cpp is not None else "on PATH"
        raise ConfigError(
            f"llama.cpp's converter ({CONVERTER}) is not {where}",
            remedy="get it with `git clone https://github.com/ggml-org/llama.cpp` and `pip install -r "
            "llama.cpp/requirements.txt`, and give that folder with --llama-cpp.",
        )
    script = (sys.executable, converter) if converter.endswith(".py") else (converter,)
    if quantize is None or quantize.lower() in DIRECT:
        return Tools(script)
    if not re.fullmatch(r"[A-Za-z0-9_]+", quantize):
        raise ConfigError(f"unknown type '{quantize}'", remedy="give one of llama-quantize's, such as Q4_K_M.")
    quantizer = _found(QUANTIZER, llama_cpp, ("build/bin", "bin", ""))
    if quantizer is None:
        raise ConfigError(
            f"{quantize} needs {QUANTIZER}, which was not found",
            remedy="build llama.cpp (`cmake -B build && cmake --build build --target llama-quantize`) and give its "
            "folder with --llama-cpp; --quantize q8_0 does not need it.",
        )
    return Tools(script, (quantizer,))


def _found(program: str, llama_cpp: Path | None, folders: Sequence[str]) -> str | None:
    """Return a program in the user's copy of llama.cpp, next to the given converter, or on PATH."""
    if llama_cpp is not None:
        given = llama_cpp.expanduser().resolve()
        if given.is_file():
            if program == CONVERTER:
                return str(given)
            given = given.parent
        for folder in folders:
            if (given / folder / program).is_file():
                return str(given / folder / program)
        if program == CONVERTER:
            return None
    return shutil.which(program)


def _mlx_tools(quantize: str | None) -> Tools:
    if quantize is not None and quantize not in MLX_BITS:
        raise ConfigError(
            f"MLX has no quantisation '{quantize}'", remedy=f"give the bits: {', '.join(sorted(MLX_BITS))}."
        )
    converter = shutil.which(MLX_CONVERTER)
    if converter is None:
        raise ConfigError(
            f"{MLX_CONVERTER} is not on PATH", remedy="on a Mac with Apple silicon: `pip install mlx-lm`."
        )
    return Tools((converter,))


def _to_mlx(model: Path, place: Path, tools: Tools, quantize: str | None) -> Path:
    bits = () if quantize is None else ("-q", "--q-bits", quantize)
    _run((*tools.converter, "--hf-path", str(model), "--mlx-path", str(place), *bits), "The converter")
    if not (place / "config.json").is_file() or not any(place.glob("*.safetensors")):
        raise CheckpointError(f"{tools.converter[-1]} wrote no model", remedy="run it yourself and read its messages.")
    return place


def _to_gguf(model: Path, place: Path, name: str, tools: Tools, quantize: str | None) -> Path:
    checkpoint = Checkpoint(model)
    dtypes = {info.dtype for info in checkpoint.infos.values()}
    lossless = dtypes.pop().lower() if len(dtypes) == 1 and dtypes <= set(MERGED_DTYPES.values()) else "f32"
    kind = quantize.lower() if quantize is not None and quantize.lower() in DIRECT else lossless
    file = place / f"{name}-{kind}.gguf"
    say(f"Converting to GGUF ({kind}) with {tools.converter[-1]}.")
    _run((*tools.converter, str(model), "--outtype", kind, "--outfile", str(file)), "The converter")
    _check_gguf(file, model)
    if not tools.quantizer:
        return file
    quantised = place / f"{name}-{quantize}.gguf"
    say(f"Quantising to {quantize}.")
    _run((*tools.quantizer, str(file), str(quantised), str(quantize)), QUANTIZER)
    if not quantised.is_file() or quantised.stat().st_size == 0:
        raise CheckpointError(f"{QUANTIZER} wrote no file", remedy="run it yourself and read its messages.")
    file.unlink()
    return quantised


def _check_gguf(file: Path, model: Path) -> None:
    """Compare a converted model's vocabulary and chat template with the original's.

    Raises:
        CheckpointError: it is missing or damaged, or differs.
    """
    if not file.is_file():
        raise CheckpointError(f"the converter wrote no {file.name}", remedy="run it yourself and read its messages.")
    if importlib.util.find_spec("gguf") is None:
        say("The converter's output is not checked: the check needs pip install 'backmerge[export]'.")
        return
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"the converter wrote no readable GGUF: {error}", remedy="convert it again.") from error
    tokens, template = reader.get_field("tokenizer.ggml.tokens"), reader.get_field("tokenizer.chat_template")
    tokenizer = load_tokenizer(model, needs_template=False)
    num_tokens = 0 if tokens is None else len(tokens.data)
    if num_tokens < len(tokenizer):
        raise CheckpointError(
            f"the GGUF has {num_tokens} tokens, but the model has {len(tokenizer)}",
            remedy="update llama.cpp; rows that tuning added to the vocabulary may be lost in conversion.",
        )
    if isinstance(tokenizer.chat_template, str) and (
        template is None or template.contents().strip() != tokenizer.chat_template.strip()
    ):
        raise CheckpointError(
            "the GGUF's chat template differs from the model's, and refusals depend on it",
            remedy="update llama.cpp, or put the model's chat template into tokenizer_config.json and export again.",
        )


def _write_modelfile(place: Path, name: str, model: Path) -> bool:
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    tokenizer = load_tokenizer(model)
    generation = GenerationConfig.from_pretrained(model) if (model / "generation_config.json").is_file() else config
    text, has_template = modelfile(name, tokenizer, generation, config.to_dict().get("max_position_embeddings"))
    (place / "Modelfile").write_text(text, encoding="utf-8")
    return has_template


def _run(command: Sequence[str], what: str) -> None:
    """Run a tool; its messages are shown only if it fails.

    Raises:
        RunError: it cannot be started, or failed.
    """
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, env=os.environ | {"NO_COLOR": "1"}
        )
    except OSError as error:
        raise RunError(f"{what} cannot be started: {error}", remedy=f"try it yourself: {command[0]} --help") from error
    if done.returncode != 0:
        lines = [line.rstrip() for line in done.stdout.decode("utf-8", "replace").splitlines() if line.strip()]
        raise RunError(
            f"{what} failed (exit code {done.returncode}):\n    " + "\n    ".join(lines[-LAST_LINES:]),
            remedy=f"try it yourself: {shlex.join(command[:3])} ...; nothing was written.",
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
