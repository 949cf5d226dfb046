"""`backmerge merge` as it is typed: what is written where, what is kept, and what is refused."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backmerge.checkpoints.reader import SINGLE, Checkpoint

Run = Callable[..., tuple[int, str, str]]
Factory = Callable[..., Path]


Child = Callable[..., Path]


@pytest.fixture
def child(make_model: Factory, tmp_path_factory: pytest.TempPathFactory) -> Child:
    """`child(seed)`: a tuned version of the base, a tenth of its norm away."""

    def make(seed: int, dtype: torch.dtype = torch.bfloat16) -> Path:
        base = make_model("llama", seed=0, dtype="bfloat16")
        directory = shutil.copytree(base, tmp_path_factory.mktemp("children") / f"child-{seed}")
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: (tensor.float() + 0.02 * torch.randn(tensor.shape, generator=generator)).to(dtype)
            for name, tensor in weights(base).items()
        }
        save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
        return directory

    return make


@pytest.fixture
def pair(make_model: Factory, child: Child) -> tuple[Path, Path]:
    """A base and a tuned version of it, in bfloat16."""
    return make_model("llama", seed=0, dtype="bfloat16"), child(1)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors."""
    return load_file(directory / SINGLE)


def test_several_lams_go_to_separate_folders(pair: tuple[Path, Path], run_cli: Run, tmp_path: Path) -> None:
    """Close ones are kept apart, one that is given twice is written once, and each is its own merge."""
    code, printed, said = run_cli("merge", *pair, "--lam", "0.2,0.2,0.20000001,0.6", "--out", tmp_path / "out")
    assert code == 0, said
    assert [Path(line).name for line in printed.splitlines()] == ["lam-0.2", "lam-0.20000001", "lam-0.6"]
    base, tuned = (weights(side) for side in pair)
    for lam in (0.2, 0.6):
        merged = weights(tmp_path / "out" / f"lam-{lam}")
        for name, tensor in merged.items():
            exact = (1 - lam) * base[name].double() + lam * tuned[name].double()
            # half an ulp of bfloat16's 8 bits, and float32's own rounding
            assert bool(((tensor.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all())


def test_card_names_the_models_and_the_default_lam_is_reported(
    pair: tuple[Path, Path], run_cli: Run, tmp_path: Path
) -> None:
    """README.md says what was merged, how, and that it was not measured; λ = 0.5 is said before it is used."""
    base, tuned = pair
    code, _, said = run_cli("merge", *pair, "--out", tmp_path / "out")
    assert code == 0
    assert "λ is 0.5, the default of linear" in said
    card = (tmp_path / "out" / "README.md").read_text().replace("`", "")  # signs in code spans
    for words in (
        f"base: {base.name}",
        f"tuned: {tuned.name}",
        "method: linear",
        "λ, the share of the tuned side: 0.5",
    ):
        assert words in card
    assert "Its safety was not measured" in card
    assert str(base.parent) not in card
    code, _, said = run_cli("merge", *pair, "--lam", "0.5", "--out", tmp_path / "out")
    assert (code, "already exists" in said, "the default of" in said) == (0, True, False)


@pytest.mark.parametrize("form", ["checkpoint", "adapter"])
def test_a_merge_does_not_appear_without_its_card(
    pair: tuple[Path, Path],
    make_adapter: Factory,
    run_cli: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    """A disk that fails at the card leaves nothing, so that the same command makes all of it again."""

    def fails(folder: Path, text: str) -> None:
        del text
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))

    base, tuned = pair
    monkeypatch.setattr("backmerge.reporting.merge_card.write_card", fails)
    model = tuned if form == "checkpoint" else make_adapter(base, seed=5)
    code, _, said = run_cli("merge", base, model, "--as", form, "--out", tmp_path / "out")
    assert (code, "Read-only file system" in said) == (2, True)
    assert list(tmp_path.glob("*out*")) == []


def test_card_names_what_the_method_was_given(pair: tuple[Path, Path], run_cli: Run, tmp_path: Path) -> None:
    """Parameters and further models are on the card; a method without a λ claims none."""
    base, tuned = pair
    given = ("--method", "resta", "--param", "beta=0.25", "--model", f"unaligned={tuned}")
    assert run_cli("merge", *pair, *given, "--out", tmp_path / "one")[0] == 0
    card = (tmp_path / "one" / "README.md").read_text().replace("`", "")  # signs in code spans
    assert f"- unaligned: {tuned.name}\n- method: resta\n- λ, the share of the tuned side: 1" in card
    assert "- beta: 0.25\n" in card
    other = shutil.copytree(tuned, tmp_path / "other")
    several = ("merge", base, tuned, other, "--method", "model_stock", "--out", tmp_path / "two")
    assert run_cli(*several)[0] == 0
    card = (tmp_path / "two" / "README.md").read_text().replace("`", "")  # signs in code spans
    assert f"- tuned: {tuned.name}, other\n- method: model_stock\n\n" in card


def test_lam_out_of_range_is_refused_before_work_begins(pair: tuple[Path, Path], run_cli: Run, tmp_path: Path) -> None:
    """The error speaks of the option."""
    code, _, said = run_cli("merge", *pair, "--lam", "0.2,1.2", "--out", tmp_path / "out")
    assert (code, "Merging" in said) == (2, False)
    assert "--lam 1.2 is out of range: λ is the share of the tuned side" in said


def test_the_same_command_again_finds_its_work_done(pair: tuple[Path, Path], run_cli: Run, tmp_path: Path) -> None:
    """A command that was stopped between two λs continues with what is missing; nothing is written twice."""
    out = tmp_path / "out"
    assert run_cli("merge", *pair, "--lam", "0.2,0.6", "--out", out)[0] == 0
    kept = (out / "lam-0.2" / SINGLE).stat().st_ino
    shutil.rmtree(out / "lam-0.6")
    code, printed, said = run_cli("merge", *pair, "--lam", "0.2,0.6", "--out", out)
    assert code == 0
    assert len(printed.splitlines()) == 2
    assert "lam-0.2 already exists" in said
    assert (out / "lam-0.2" / SINGLE).stat().st_ino == kept
    assert (out / "lam-0.6" / SINGLE).is_file()


def test_an_adapter_again(pair: tuple[Path, Path], make_adapter: Factory, run_cli: Run, tmp_path: Path) -> None:
    """LoRAs merge into LoRAs, one for each λ; the same command finds them, another rank or realisation does not."""
    command = ["merge", pair[0], make_adapter(pair[0], seed=1), "--lam", "0.2,0.6", "--out", tmp_path / "out"]
    assert run_cli(*command, "--as", "adapter")[0] == 0
    assert (tmp_path / "out" / "lam-0.2" / "adapter_model.safetensors").is_file()
    code, printed, said = run_cli(*command, "--as", "auto")
    assert (code, len(printed.splitlines())) == (0, 2)
    assert "already exists" in said
    assert run_cli(*command, "--as", "adapter", "--rank", "2")[0] == 2
    assert run_cli(*command)[0] == 2
    assert run_cli(*command, "--as", "adapter", "--rank", "2", "--force")[0] == 0
    assert run_cli(*command, "--as", "adapter", "--rank", "2")[0] == 0


def test_nothing_is_written_if_one_of_several_is_refused(
    pair: tuple[Path, Path], child: Child, run_cli: Run, tmp_path: Path
) -> None:
    """A folder that stands in the way of the second model keeps the first from being written, too."""
    third = child(2)
    (tmp_path / "out" / third.name).mkdir(parents=True)
    (tmp_path / "out" / third.name / "notes.txt").write_text("mine")
    assert run_cli("merge", *pair, third, "--out", tmp_path / "out")[0] == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == [third.name]


@pytest.mark.parametrize("change", ["another model", "another method", "another seed", "a folder of no merge"])
def test_what_is_there_is_not_overwritten(
    pair: tuple[Path, Path], child: Child, run_cli: Run, tmp_path: Path, change: str
) -> None:
    """Without --force, a folder that holds something else than this command's result stays; with it, it goes."""
    out = tmp_path / "out"
    command: list[Any] = ["merge", *pair, "--lam", "0.5", "--out", out]
    assert run_cli(*command)[0] == 0
    if change == "another model":
        command[2] = child(2)
    elif change == "another method":
        command += ["--method", "slerp"]
    elif change == "another seed":
        command += ["--seed", "3"]
    else:
        (out / "backmerge.json").unlink()
    before = (out / SINGLE).read_bytes()
    code, _, said = run_cli(*command)
    assert code == 2
    # --force is offered only for what backmerge wrote
    assert ("--force" in said) is (change != "a folder of no merge")
    assert (out / SINGLE).read_bytes() == before
    assert run_cli(*command, "--force")[0] == (2 if change == "a folder of no merge" else 0)
    assert (out / "backmerge.json").is_file() is (change != "a folder of no merge")


def test_another_lam_for_some_tensors(pair: tuple[Path, Path], run_cli: Run, tmp_path: Path) -> None:
    """--where: the first pattern that matches decides, a gradient rises over the layers, the rest takes --lam."""
    rows = ["--where", "mlp=0", "--where", "*q_proj*=0:1", "--where", "attention=1"]
    assert run_cli("merge", *pair, "--lam", "0.5", *rows, "--out", tmp_path / "out")[0] == 0
    (base, tuned), merged = (weights(side) for side in pair), weights(tmp_path / "out")
    for name, tensor in merged.items():
        at_base, at_tuned = torch.equal(tensor, base[name]), torch.equal(tensor, tuned[name])
        if "mlp" in name or "layers.0.self_attn.q_proj" in name:
            assert at_base, name
        elif "attn" in name:
            assert at_tuned, name
        else:
            assert not at_base, name
            assert not at_tuned, name
    assert json.loads((tmp_path / "out" / "backmerge.json").read_text())["recipe"]["lam"]["rest"] == 0.5


def test_another_dtype(pair: tuple[Path, Path], run_cli: Run, tmp_path: Path) -> None:
    """--dtype float32 keeps all of the change, and the configuration says so."""
    assert run_cli("merge", *pair, "--lam", "0.5", "--dtype", "float32", "--out", tmp_path / "out")[0] == 0
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_models_of_different_dtypes_need_the_option(
    pair: tuple[Path, Path], child: Child, run_cli: Run, tmp_path: Path
) -> None:
    """Law 4: bfloat16 with float32 is refused by name of tensor and option; with the option it is merged."""
    command = ["merge", pair[0], child(1, torch.float32), "--out", tmp_path / "out"]
    code, _, said = run_cli(*command)
    assert code == 2
    assert "is BF16 in the base and F32 in the tuned model" in said
    assert "--dtype" in said
    assert run_cli(*command, "--dtype", "bfloat16")[0] == 0


def test_stochastic_rounding_is_asked_for(pair: tuple[Path, Path], run_cli: Run, tmp_path: Path) -> None:
    """--rounding stochastic differs from the nearest by at most one step, by its seed, and is repeatable."""
    outs = [tmp_path / name for name in ("nearest", "one", "again", "two")]
    for out, more in zip(outs, ([], ["--seed", "1"], ["--seed", "1"], ["--seed", "2"]), strict=True):
        rounding = ["--rounding", "stochastic"] if more else []
        assert run_cli("merge", *pair, "--lam", "0.3", *rounding, *more, "--out", out)[0] == 0
    nearest, one, again, two = ((out / SINGLE).read_bytes() for out in outs)
    assert one == again
    assert len({nearest, one, two}) == 3


def grown(model: Path, to: Path, rows: int) -> Path:
    """A model whose vocabulary has more tokens."""
    shutil.copytree(model, to)
    tensors = weights(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.full((rows, 32), 0.25).bfloat16()])
    save_file(tensors, to / SINGLE, metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + rows}))
    return to


def test_added_tokens_are_kept_only_on_request(pair: tuple[Path, Path], run_cli: Run, tmp_path: Path) -> None:
    """A grown vocabulary is refused with its option; with it, the new rows are the tuned model's, as is the config."""
    tuned = grown(pair[1], tmp_path / "tuned", 3)
    command = ["merge", pair[0], tuned, "--lam", "0.5", "--out", tmp_path / "out"]
    code, _, said = run_cli(*command)
    assert code == 2
    assert "--extra-rows tuned" in said
    assert run_cli(*command, "--extra-rows", "tuned")[0] == 0
    plain = tmp_path / "plain"
    assert run_cli("merge", *pair, "--lam", "0.5", "--out", plain)[0] == 0
    merged, without = weights(tmp_path / "out"), weights(plain)
    for name, tensor in merged.items():
        assert torch.equal(tensor[: len(without[name])], without[name])
        assert torch.equal(tensor[len(without[name]) :], weights(tuned)[name][len(without[name]) :])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((tuned / "config.json").read_text())


def test_several_tuned_models_one_by_one(pair: tuple[Path, Path], child: Child, run_cli: Run, tmp_path: Path) -> None:
    """A method that takes one tuned model merges each into a folder of its name."""
    third = child(2)
    code, printed, _ = run_cli("merge", *pair, third, "--lam", "0.5", "--out", tmp_path / "out")
    assert code == 0
    assert [Path(line).name for line in printed.splitlines()] == [pair[1].name, third.name]


def test_unrelated_models_are_refused(
    pair: tuple[Path, Path], make_model: Factory, run_cli: Run, tmp_path: Path
) -> None:
    """Another model of the same shape is not a child; --allow-unrelated merges it all the same."""
    command = ["merge", pair[0], make_model("llama", seed=5, dtype="bfloat16"), "--out", tmp_path / "out"]
    code, _, said = run_cli(*command)
    assert code == 2
    assert "does not look like it was made from" in said
    assert "--allow-unrelated" in said
    assert not (tmp_path / "out").exists()
    assert run_cli(*command, "--allow-unrelated")[0] == 0


def test_rounding_loss_is_reported(run_cli: Run, tmp_path: Path) -> None:
    """Where bfloat16 loses a tenth of the change or more, merge says so, and what keeps it; float32 loses nothing."""
    generator = torch.Generator().manual_seed(0)
    base = {"model.layers.0.weight": torch.randn(500, 1000, generator=generator).bfloat16()}
    tuned = {
        name: (w.float() + 0.01 * torch.randn(w.shape, generator=generator)).bfloat16() for name, w in base.items()
    }
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / SINGLE, metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text("{}")
    command = ["merge", tmp_path / "base", tmp_path / "tuned", "--lam", "0.2"]
    told = run_cli(*command, "--out", tmp_path / "out")[2]
    assert "Warning: out: " in told
    assert "of the change survived rounding to bfloat16" in told
    assert "--rounding stochastic" in told
    assert "of the change survived rounding to bfloat16" in (tmp_path / "out" / "README.md").read_text()
    told = run_cli(*command, "--dtype", "float32", "--out", tmp_path / "wide")[2]
    assert "wide: 100 % of the change survived rounding to float32" in told or "more than 99 %" in told
    assert "Warning" not in told
    assert json.loads((tmp_path / "wide" / "backmerge.json").read_text())["rounding_loss"] < 1e-5


def test_a_mergekit_file(pair: tuple[Path, Path], run_cli: Run, tmp_path: Path) -> None:
    """--config takes models and method from mergekit's YAML, says where ours differs, and gives the same as ours."""
    (tmp_path / "mergekit.yml").write_text(
        f"merge_method: linear\nmodels:\n- {{model: {pair[0]}, parameters: {{weight: 0.5}}}}\n"
        f"- {{model: {pair[1]}, parameters: {{weight: 0.5}}}}\ndtype: bfloat16\n"
    )
    code, _, said = run_cli("merge", "--config", tmp_path / "mergekit.yml", "--out", tmp_path / "out")
    assert code == 0
    assert "Note: arithmetic is always in float32 here" in said
    assert run_cli("merge", *pair, "--lam", "0.5", "--out", tmp_path / "ours")[0] == 0
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / "ours" / SINGLE).read_bytes()
    code, _, said = run_cli("merge", *pair, "--config", tmp_path / "mergekit.yml", "--out", tmp_path / "other")
    assert code == 2
    assert "--config already names the models" in said
    for option in (["--lam", "0.3"], ["--method", "slerp"], ["--where", "mlp=0.1"]):
        code, _, said = run_cli("merge", "--config", tmp_path / "mergekit.yml", *option, "--out", tmp_path / "other")
        assert code == 2
        assert "--config already defines the merge" in said


def test_methods_that_take_several(pair: tuple[Path, Path], child: Child, run_cli: Run, tmp_path: Path) -> None:
    """Their tuned models are merged together, into one folder; parameters may be of each; λ is the method's own."""
    third = child(2)
    assert run_cli("merge", *pair, third, "--method", "model_stock", "--out", tmp_path / "stock")[0] == 0
    weights_of_each = ["--method", "task_arithmetic", "--param", "weight=[1.0, 0.0]", "--dtype", "float32"]
    assert run_cli("merge", *pair, third, *weights_of_each, "--out", tmp_path / "sum")[0] == 0
    tuned = weights(pair[1])
    for name, tensor in weights(tmp_path / "sum").items():
        assert torch.allclose(tensor, tuned[name].float(), atol=1e-6)
    code, _, said = run_cli("merge", *pair, third, "--method", "model_stock", "--lam", "0.5", "--out", tmp_path / "x")
    assert code == 2
    assert "has no λ" in said


def test_the_methods_tell_of_themselves(run_cli: Run) -> None:
    """`methods` lists all with what they take; one by name with all that it says."""
    code, printed, _ = run_cli("methods")
    assert code == 0
    for words in ("model_stock", "2 tuned models or more", "--model unaligned=FOLDER", "density=0.2", "drop=0.5"):
        assert words in printed
    code, printed, _ = run_cli("methods", "safe_lora")
    assert code == 0
    assert "pretrained model before alignment" in printed
    assert run_cli("methods", "tise")[0] == 2


def test_shards_and_checksums(pair: tuple[Path, Path], run_cli: Run, tmp_path: Path) -> None:
    """--max-shard-size cuts the output, and --sha256 records what sha256sum prints."""
    options = ["--max-shard-size", "0.02MB", "--sha256"]
    assert run_cli("merge", *pair, *options, "--out", tmp_path / "out")[0] == 0
    card = json.loads((tmp_path / "out" / "backmerge.json").read_text())
    assert len(card["sha256"]) > 2
    for name, digest in card["sha256"].items():
        printed = subprocess.run(["sha256sum", tmp_path / "out" / name], capture_output=True, text=True, check=True)
        assert printed.stdout.split()[0] == digest
    assert card["fingerprint"] == Checkpoint(tmp_path / "out").fingerprint


REFUSED = {
    "no out": (["{base}", "{tuned}"], "--out is missing"),
    "no models": (["--out", "{out}"], "BASE and TUNED are missing"),
    "no λ": (["{base}", "{tuned}", "--lam", "", "--out", "{out}"], "--lam has no numbers"),
    "λ that is none": (["{base}", "{tuned}", "--lam", "half", "--out", "{out}"], "expected numbers"),
    "λ beyond 1": (["{base}", "{tuned}", "--lam", "1.5", "--out", "{out}"], "--lam 1.5 is out of range: λ is"),
    "misspelt method": (["{base}", "{tuned}", "--method", "linaer", "--out", "{out}"], "did you mean 'linear'"),
    "misspelt dtype": (["{base}", "{tuned}", "--dtype", "bfloat", "--out", "{out}"], "did you mean 'bfloat16'"),
    "misspelt parameter": (["{base}", "{tuned}", "--param", "dorp=1", "--out", "{out}"], "no parameter 'dorp'"),
    "parameter without value": (["{base}", "{tuned}", "--param", "drop", "--out", "{out}"], "expected NAME=VALUE"),
    "pattern of nothing": (["{base}", "{tuned}", "--where", "mpl=0.2", "--out", "{out}"], "matches 'mpl'"),
    "gradient of words": (["{base}", "{tuned}", "--where", "mlp=a:b", "--out", "{out}"], "expected a number"),
    "shards of nothing": (["{base}", "{tuned}", "--max-shard-size", "0GB", "--out", "{out}"], "expected a size"),
    "rank of no adapter": (["{base}", "{tuned}", "--rank", "4", "--out", "{out}"], "--rank is only for adapters"),
    "no adapter": (["{base}", "{tuned}", "--as", "adapter", "--out", "{out}"], "this merge cannot be an adapter"),
    "unknown extra model": (["{base}", "{tuned}", "--model", "x={base}", "--out", "{out}"], "no model named 'x'"),
    "λ twice": (["{base}", "{tuned}", "--lam", "0.2", "--lam", "0.9", "--out", "{out}"], "values (--lam λ,...)."),
    "method twice": (["{base}", "{tuned}", "--method=slerp", "--method=linear", "--out", "{out}"], "give it once."),
    "pattern twice": (["{base}", "{tuned}", "--where", "mlp=0.4", "--where", "mlp=0.9"], "'mlp' twice: 0.4 and 0.9"),
    "onto the base": (["{base}", "{tuned}", "--force", "--out", "{base}"], "writing there would destroy it"),
    "one twice": (["{base}", "{tuned}", "{tuned}", "--out", "{out}"], "same folder name"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(pair: tuple[Path, Path], run_cli: Run, tmp_path: Path, kind: str) -> None:
    """One clear error, exit 2, and nothing is written."""
    arguments, words = REFUSED[kind]
    places = {"base": pair[0], "tuned": pair[1], "out": tmp_path / "out"}
    code, _, said = run_cli("merge", *(argument.format(**places) for argument in arguments))
    assert code == 2
    assert words in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("as_", ["checkpoint", "adapter"])
def test_merging_loads_no_transformers(
    pair: tuple[Path, Path], make_adapter: Factory, tmp_path: Path, as_: str
) -> None:
    """Law 15: a merge needs torch, neither transformers nor peft, unless it is verified; an adapter not even torch."""
    command = ["merge", pair[0], make_adapter(pair[0], seed=1), "--as", as_, "--no-verify", "--out", tmp_path / "out"]
    code = (
        f"import sys; sys.argv = {['backmerge', *map(str, command)]}\n"
        "from backmerge import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as exit_:\n    assert not exit_.code, exit_.code\n"
        "print(*sorted(name for name in sys.modules if name.startswith('backmerge.commands.')))\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    commands, loaded = (set(line.split()) for line in done.stdout.splitlines()[-2:])
    assert not commands & {"backmerge.commands.restore", "backmerge.commands.finetune"}  # other commands
    assert not loaded & {"transformers", "peft", "accelerate", "datasets", "scipy", "matplotlib"}
    assert ("torch" in loaded) is (as_ == "checkpoint")


def test_the_tuned_models_config_is_kept(pair: tuple[Path, Path], run_cli: Run, tmp_path: Path) -> None:
    """At λ=1 the merged model computes what the tuned model does, RoPE and context length included."""
    from transformers import AutoModelForCausalLM

    base, tuned = pair
    config = json.loads((tuned / "config.json").read_text())
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "max_position_embeddings": 4096}
    (tuned / "config.json").write_text(json.dumps(config))
    code, _, said = run_cli("merge", *pair, "--lam", 1, "--out", tmp_path / "out")
    assert code == 0, said
    assert "config.json: base and tuned model differ; the merged model has the tuned model's" in said
    ids = torch.arange(5, 60)[None]
    logits = [AutoModelForCausalLM.from_pretrained(place)(ids).logits for place in (tuned, tmp_path / "out")]
    assert torch.equal(*logits)
    code, _, said = run_cli("merge", *pair, "--lam", 1, "--config-from", "base", "--out", tmp_path / "kept")
    assert code == 0, said
    assert json.loads((tmp_path / "kept" / "config.json").read_text()) == json.loads((base / "config.json").read_text())


def test_processors_and_more_templates_are_kept(pair: tuple[Path, Path], run_cli: Run, tmp_path: Path) -> None:
    """AutoProcessor and vLLM need them, whichever side has them."""
    names = ("preprocessor_config.json", "processor_config.json", "additional_chat_templates/tool_use.jinja")
    base = shutil.copytree(pair[0], tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    for name in names:
        (base / name).write_text("{}")
    code, _, said = run_cli("merge", base, pair[1], "--lam", 0.5, "--out", tmp_path / "out")
    assert code == 0, said
    assert all((tmp_path / "out" / name).is_file() for name in names)
