"""What goes wrong while a merge is written: killed processes, full and read-only disks, damaged and hostile inputs."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from backmerge.checkpoints import writer
from backmerge.checkpoints.reader import INDEX, SINGLE, Checkpoint
from backmerge.errors import CheckpointError, MergeError
from backmerge.merging.recipe import Variant
from backmerge.merging.to_disk import write_all, write_merged
from forked import started

SHARD = 800_000  # bytes


def merge_killed_at(pair: tuple[Path, Path], out: Path, last: int) -> None:
    """Merge two λs in one pass, in small shards, in a process that kills itself at a step as kill -9 would.

    Each block that is written and each file or folder that is made, opened, renamed or removed is a step. `steps` next
    to the output gets their number.
    """
    recipe = Variant(*map(Checkpoint, pair))
    counter, write, done = itertools.count(1), writer._write, 0

    def step() -> None:
        nonlocal done
        done = next(counter)
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(*given: Any) -> None:
        step()
        write(*given)

    writer._write = counted
    audited = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
    sys.addaudithook(lambda event, _: step() if event in audited else None)
    write_all({out / f"lam-{lam}": recipe.at(lam) for lam in (0.2, 0.6)}, max_shard_bytes=SHARD)
    num_steps = done
    out.with_suffix(".steps").write_text(str(num_steps))


def two_models(place: Path, rows: Sequence[int]) -> tuple[Path, Path]:
    """Two models with a tensor of 1,000 columns for each number of rows."""
    sides = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        directory = place / f"side-{seed}"
        directory.mkdir()
        tensors = {
            f"model.layers.{i}.weight": torch.randn(number, 1000, generator=generator).bfloat16()
            for i, number in enumerate(rows)
        }
        save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
        (directory / "config.json").write_text("{}")
        sides.append(directory)
    return sides[0], sides[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of 64 MB, more than the small disk holds."""
    return two_models(tmp_path_factory.mktemp("pair"), [2000] * 16)


@pytest.fixture(scope="module")
def small_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of 6 MB in five shards, with a tensor that is written in several blocks."""
    return two_models(tmp_path_factory.mktemp("small"), [1500, *[100] * 15])


def contents(directory: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def merge_in_a_process(pair: tuple[Path, Path], out: Path, *, last: int = 0) -> int:
    """How many steps a merge takes; it is killed at the one named."""
    process = started(merge_killed_at, pair, out, last, log=out.with_suffix(".log"))
    process.join()
    assert process.exitcode == (-signal.SIGKILL if last else 0), out.with_suffix(".log").read_text()
    return 0 if last else int(out.with_suffix(".steps").read_text())


def killed_merges(pair: tuple[Path, Path], tmp_path: Path, times: int) -> None:
    """Kill -9 at random moments: no half model stands under its name, and the next try ends with the same bytes."""
    num_steps = merge_in_a_process(pair, tmp_path / "whole")
    expected = {path.name: contents(path) for path in (tmp_path / "whole").iterdir()}
    recipe = Variant(*map(Checkpoint, pair))
    for last in random.Random(0).sample(range(1, num_steps), times):  # noqa: S311 - moments to kill at, no secrets
        out = tmp_path / f"out-{last}"
        merge_in_a_process(pair, out, last=last)
        named = {path.name: contents(path) for path in out.glob("lam-*")}
        assert all(expected[name] == files for name, files in named.items())
        left = {out / f"lam-{lam}": recipe.at(lam) for lam in (0.2, 0.6) if f"lam-{lam}" not in named}
        if left:
            write_all(left, max_shard_bytes=SHARD)
        assert {path.name: contents(path) for path in out.iterdir()} == expected
        shutil.rmtree(out, ignore_errors=True)


def test_a_killed_merge_leaves_nothing_half_written(small_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Law 11, ten times; what the killed process left beside is cleared by the next try."""
    killed_merges(small_pair, tmp_path, 10)


@pytest.mark.slow
def test_a_hundred_killed_merges_leave_nothing_half_written(small_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Law 11, a hundred times."""
    killed_merges(small_pair, tmp_path, 100)


def test_a_disk_that_is_too_small_is_refused_at_once(pair: tuple[Path, Path], small_disk: Path) -> None:
    """64 MB do not go into 40: said before the first byte, and nothing is left."""
    with pytest.raises(CheckpointError, match=r"needs 0\.1 GB, but only 0\.0 GB are free"):
        write_merged(Variant(*map(Checkpoint, pair)).at(0.5), small_disk / "merged")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_another_fills_ends_in_an_error(
    pair: tuple[Path, Path], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the room is gone between the look and the writing, too."""
    monkeypatch.setattr("backmerge.merging.to_disk.check_room", lambda *_: None)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device"):
        write_merged(Variant(*map(Checkpoint, pair)).at(0.5), small_disk / "merged")
    assert list(small_disk.iterdir()) == []


def test_a_read_only_disk_is_an_error(tiny_base: Path, tiny_tuned: Path, small_disk: Path) -> None:
    """Nothing can be written there, and what is there stays."""
    (small_disk / "kept").write_text("x")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match=r"cannot write .*Read-only"):
        write_merged(Variant(Checkpoint(tiny_base), Checkpoint(tiny_tuned)).at(0.5), small_disk / "merged")
    assert [path.name for path in small_disk.iterdir()] == ["kept"]


def test_one_bad_tensor_keeps_every_output_unchanged(tiny_base: Path, tiny_tuned: Path, tmp_path: Path) -> None:
    """Of several λs in one pass, all are written or none; what stood there is kept."""
    bad = shutil.copytree(tiny_tuned, tmp_path / "bad")
    tensors = load_file(bad / SINGLE)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, bad / SINGLE)
    recipe = Variant(Checkpoint(tiny_base), Checkpoint(bad))
    write_merged(Variant(Checkpoint(tiny_base)), tmp_path / "out" / "lam-0.2")
    before = contents(tmp_path / "out" / "lam-0.2")
    with pytest.raises(MergeError, match="NaN"):
        write_all({tmp_path / "out" / f"lam-{lam}": recipe.at(lam) for lam in (0.2, 0.6)}, replace=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lam-0.2"]
    assert contents(tmp_path / "out" / "lam-0.2") == before


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tiny_base: Path, tiny_tuned: Path, tmp_path: Path) -> None:
    """Another process that truncates an input ends the merge, not the program."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    variant = Variant(Checkpoint(base), Checkpoint(tiny_tuned)).at(0.5)
    os.truncate(base / SINGLE, 4096)
    with pytest.raises(CheckpointError, match="became shorter after it was opened"):
        write_merged(variant, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_files_have_ordinary_modes(tiny_base: Path, tiny_tuned: Path, tmp_path: Path) -> None:
    """A merged model can be read by whoever the umask lets."""
    before = os.umask(0o027)
    try:
        write_merged(Variant(Checkpoint(tiny_base), Checkpoint(tiny_tuned)).at(0.5), tmp_path / "merged")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "merged").iterdir()} == {0o640}
    assert (tmp_path / "merged").stat().st_mode & 0o777 == 0o750


def mutated(header: dict[str, object], draw: Callable[..., object]) -> bytes:
    """A header in which one thing is wrong, or some of its bytes are."""
    names = [name for name in header if name != "__metadata__"]
    entry = json.loads(json.dumps(header[draw(st.sampled_from(names))]))
    begin, end = entry["data_offsets"]
    kind = draw(st.sampled_from(["offsets", "shape", "dtype", "bytes", "length"]))
    if kind == "offsets":
        shift = draw(st.integers(-3, 3).filter(bool))
        entry["data_offsets"] = draw(
            st.sampled_from([[begin + shift, end], [begin, end + shift], [end, begin], [begin]])
        )
    elif kind == "shape":
        entry["shape"] = draw(st.sampled_from([[], [-1], [2**63], [0], [*entry["shape"], 2], "x"]))
    elif kind == "dtype":
        entry["dtype"] = draw(st.sampled_from(["F16", "F99", "", 3, "I8"]))
    text = bytearray(json.dumps({**header, draw(st.sampled_from(names)): entry}).encode())
    if kind == "bytes":
        text[draw(st.integers(0, len(text) - 1))] = draw(st.integers(0, 255))
    length = len(text) + (draw(st.integers(-9, 9)) if kind == "length" else 0)
    return max(length, 0).to_bytes(8, "little") + bytes(text)


def fuzz(model: Path, draw: Callable[..., object]) -> None:
    """A changed header is read as what it says, within its file, or is refused with a clear error; never a crash."""
    whole = (model / "whole").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    (model / SINGLE).write_bytes(mutated(header, draw) + whole[8 + length :])
    try:
        weights = Checkpoint(model)
        for name, info in weights.infos.items():
            assert weights.tensor(name).shape == info.shape
            assert info.offset + info.length <= (model / SINGLE).stat().st_size
    except CheckpointError as error:
        assert error.remedy  # noqa: PT017 - it need not be raised


FUZZED = st.data()


@given(data=FUZZED)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_headers(data: st.DataObject, fuzzed: Path) -> None:
    """A hundred and fifty changed headers."""
    fuzz(fuzzed, data.draw)


@pytest.mark.slow
@given(data=FUZZED)
@settings(max_examples=4000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_thousands_of_changed_headers(data: st.DataObject, fuzzed: Path) -> None:
    """Four thousand changed headers."""
    fuzz(fuzzed, data.draw)


@given(data=FUZZED)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_indexes(data: st.DataObject, fuzzed: Path) -> None:
    """An index that says anything else than what its shards hold is refused; nothing outside the folder is opened."""
    shutil.copy(fuzzed / "whole", fuzzed / SINGLE)
    names = sorted(load_file(fuzzed / SINGLE))
    weight_map: dict[object, object] = dict.fromkeys(names, SINGLE)
    files = st.sampled_from(
        [SINGLE, "../" + SINGLE, "/etc/passwd", "absent.safetensors", "", ".", "x\0.safetensors", None, 3, [SINGLE]]
    )
    weight_map[data.draw(st.sampled_from([*names, "model.other"]))] = data.draw(files)
    (fuzzed / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    try:
        assert sorted(Checkpoint(fuzzed).infos) == names
        assert weight_map == dict.fromkeys(names, SINGLE)
    except CheckpointError:
        assert weight_map != dict.fromkeys(names, SINGLE)
    finally:
        (fuzzed / INDEX).unlink()


@pytest.fixture
def fuzzed(tiny_base: Path, tmp_path: Path) -> Path:
    """A model whose weights are kept beside, as `whole`."""
    model = shutil.copytree(tiny_base, tmp_path / "model")
    shutil.move(model / SINGLE, model / "whole")
    return model
