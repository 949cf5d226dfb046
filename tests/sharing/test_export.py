"""Export: the user's converter is found, driven and checked, and nothing half-done is left."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backmerge.errors import BackmergeError, CheckpointError, ConfigError, RunError
from backmerge.sharing.export import RECORD, export_model

CONVERTER = Path(__file__).with_name("tiny_converter.py")


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Path:
    """A folder like llama.cpp's, with a converter of tiny Llamas and a program that copies instead of quantising."""
    folder = tmp_path / "llama.cpp"
    (folder / "build" / "bin").mkdir(parents=True)
    shutil.copyfile(CONVERTER, folder / "convert_hf_to_gguf.py")
    program(folder / "build" / "bin" / "llama-quantize", "import shutil\nshutil.copyfile(*sys.argv[1:3])")
    return folder


def program(file: Path, body: str) -> Path:
    """An executable of these lines of Python."""
    file.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    file.chmod(0o755)
    return file


@pytest.fixture(scope="module")
def llama(make_model: Callable[..., Path]) -> Path:
    """A random Llama."""
    return make_model("llama", seed=5)


def test_a_round_trip_gives_the_same_model(llama: Path, llama_cpp: Path, tmp_path: Path) -> None:
    """What the GGUF holds, read by transformers, computes what the folder does."""
    pytest.importorskip("gguf")
    import torch
    from transformers import AutoModelForCausalLM

    done = export_model(llama, "gguf", tmp_path / "out", name="tiny", llama_cpp=llama_cpp)
    assert done.model == tmp_path / "out" / "tiny-f32.gguf"
    assert done.serve.startswith(f"llama-server -m {done.model} --alias tiny")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["sha256"].keys() == {"tiny-f32.gguf"}
    ids = torch.arange(12)[None]
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)(ids).logits
        for folder, how in ((llama, {}), (done.directory, {"gguf_file": done.model.name}))
    )
    assert torch.equal(ours, theirs)


def test_only_the_quantised_copy_is_kept(llama: Path, llama_cpp: Path, tmp_path: Path) -> None:
    """llama-quantize is found in the same folder; the file before it goes, and a Modelfile names what is left."""
    pytest.importorskip("gguf")
    done = export_model(llama, "ollama", tmp_path / "q4", name="tiny", quantize="Q4_K_M", llama_cpp=llama_cpp)
    assert sorted(file.name for file in done.directory.iterdir()) == ["Modelfile", RECORD, "tiny-Q4_K_M.gguf"]
    assert (done.directory / "Modelfile").read_text().startswith("FROM ./tiny-Q4_K_M.gguf\n")
    assert done.serve == f"ollama create tiny -f {done.directory / 'Modelfile'}"


def test_an_adapter_is_merged_into_its_base_first(
    tmp_path: Path,
    make_model: Callable[..., Path],
    llama_cpp: Path,
    make_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The converter is given a checkpoint, which is not left behind; what rounding it lost is said, with a remedy."""
    llama = make_model("llama", seed=3, tied=True, dtype="bfloat16")
    seen = tmp_path / "seen.txt"
    program(
        llama_cpp / "convert_hf_to_gguf.py",
        "import pathlib\nfolder = pathlib.Path(sys.argv[1])\n"
        f"pathlib.Path({str(seen)!r}).write_text(f'{{folder}} {{(folder / \"config.json\").is_file()}}')\n"
        "pathlib.Path(sys.argv[5]).write_text('x')",
    )
    monkeypatch.setattr("backmerge.sharing.export._check_gguf", lambda *_: None)
    monkeypatch.setattr("backmerge.merging.rounding.LEAST_SAMPLE", 1)  # the model is tiny
    monkeypatch.setattr("backmerge.merging.rounding.NOTABLE_LOSS", 0.01)
    adapter = make_adapter(llama, lora_alpha=1)
    export_model(adapter, "gguf", tmp_path / "out", name="tiny", base=str(llama), llama_cpp=llama_cpp)
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(r"Warning: The merged model: \d+ % of the change survived rounding to bfloat16", told)
    assert "--dtype float32" in told
    folder, is_model = seen.read_text().split()
    assert is_model == "True"
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        ("print('one\\nno such architecture'); sys.exit(3)", RunError, "exit code 3.*no such architecture"),
        ("", CheckpointError, "wrote no tiny-f32.gguf"),
        ("open(sys.argv[5], 'w').write('x')", CheckpointError, "no readable GGUF"),
    ],
)
def test_what_a_converter_does_wrong_is_found(
    body: str, error: type[BackmergeError], words: str, llama: Path, llama_cpp: Path, tmp_path: Path
) -> None:
    """It fails, writes nothing, or no GGUF: said in its own last words, and nothing is left."""
    pytest.importorskip("gguf")
    program(llama_cpp / "convert_hf_to_gguf.py", body)
    with pytest.raises(error, match=f"(?s){words}"):
        export_model(llama, "gguf", tmp_path / "out", name="tiny", llama_cpp=llama_cpp)
    assert not list(tmp_path.glob("*out*"))


def test_another_chat_template_is_refused(llama: Path, llama_cpp: Path, tmp_path: Path) -> None:
    """A converter that changes it may undo refusals."""
    pytest.importorskip("gguf")
    file = llama_cpp / "convert_hf_to_gguf.py"
    file.write_text(
        file.read_text().replace('((arguments.model / "chat_template.jinja").read_text())', "('{{ messages }}')")
    )
    with pytest.raises(CheckpointError, match="chat template differs"):
        export_model(llama, "gguf", tmp_path / "out", name="tiny", llama_cpp=llama_cpp)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"llama_cpp": Path("nowhere")}, "not in nowhere"),
        ({}, "not on PATH"),
        ({"to": "mlx"}, "mlx_lm.convert is not on PATH"),
        ({"to": "mlx", "quantize": "Q4_K_M"}, "MLX has no quantisation"),
        ({"name": "a/b"}, "not a valid name"),
    ],
)
def test_missing_parts_are_reported_before_anything_is_written(
    asked: dict[str, Any], words: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with where to get it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=words):
        export_model(llama, **{"to": "gguf", "out": tmp_path / "out", "name": "tiny", **asked})
    assert not (tmp_path / "out").exists()


def test_mlx_is_driven_with_bits(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm's own options; what it writes is a folder with configuration and weights."""
    program(
        tmp_path / "mlx_lm.convert",
        "import pathlib\n"
        "assert sys.argv[1:] == ['--hf-path', sys.argv[2], '--mlx-path', sys.argv[4], '-q', '--q-bits', '4']\n"
        "to = pathlib.Path(sys.argv[4])\nto.mkdir()\n"
        "[(to / n).touch() for n in ('config.json', 'm.safetensors')]",
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    done = export_model(llama, "mlx", tmp_path / "out", name="tiny", quantize="4")
    assert done.serve == f"mlx_lm.server --model {tmp_path / 'out' / 'tiny'} --port 8080"


def test_the_command_says_how_to_check_again(
    run: Path, llama_cpp: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    """A run stands for its model, and is what the copy is held against."""
    pytest.importorskip("gguf")
    code, printed, errors = run_cli("export", run, "--out", tmp_path / "small", "--llama-cpp", llama_cpp)
    assert code == 0, errors
    assert f"backmerge check small --against-run {run} --engine openai" in printed
