"""Compare our merges with mergekit's, tensor for tensor: `python -m benchmarks.mergekit_conformance`.

Merges the same folders with both, in float32 inside: tiny Llama, Gemma and Qwen2 models, with tied and untied
embeddings, in float32 and bfloat16, near to their base (where SLERP is straight) and far from it. Prints a Markdown
table and exits with 1 where a difference is not expected. The rows are in conformance_rows.py.

bfloat16 may be one ulp apart where |x| > 1e-4. float32 is judged in ulps of the largest operand: where terms cancel,
the result's own ulp is far below the rounding of either tool.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.comparison import SMALL, ulps_apart
from benchmarks.conformance_rows import ROWS, Row
from benchmarks.peer import mergekit_python
from benchmarks.synthetic import write_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = ("llama", "gemma", "qwen2")
DTYPES = ("float32", "bfloat16")
SPREAD = 0.2  # of the weights
NEAR, FAR = 0.02, 0.6  # norm of a delta over that of the weights; SLERP is straight up to 0.03
MAX_TUNED = 3
# kind of model, and a tensor that mergekit drops from it without a word
DROPPED = {"gemma-untied": "lm_head.weight"}
JOBS = Path(__file__).with_name("peer_jobs.py")


class Family(NamedTuple):
    """A base and tuned models of one kind."""

    kind: str
    dtype: str
    distance: float
    base: Path
    tuned: Sequence[Path]

    @property
    def name(self) -> str:
        """Of its own among all families."""
        return f"{self.kind}-{self.dtype}-{self.distance:g}"


@dataclass
class Finding:
    """What was found for a row in one dtype, over all families.

    Attributes:
        num_tensors: Compared, over all families.
        num_dropped: Tensors that mergekit is known to drop.
        num_undecided: Elements left out, for their place in an order is shared.
        ulps: The largest difference where |x| > 1e-4.
        operand_ulps: The largest difference anywhere, in ulps of the largest operand.
        lacking: "ours" or "mergekit" and the name of a tensor that it lacks, with the number of families.
        error: What stopped our merge.
    """

    num_tensors: int = 0
    num_dropped: int = 0
    num_undecided: int = 0
    ulps: int = 0
    operand_ulps: float = 0.0
    lacking: Counter[str] = field(default_factory=Counter)
    error: str = ""

    def is_expected(self, row: Row, dtype: str) -> bool:
        """Whether this is what the row says."""
        if self.error or self.lacking or not self.num_tensors:
            return False
        if row.relation == "differs":
            return True
        return self.ulps <= 1 if dtype == "bfloat16" else self.operand_ulps <= row.float32_ulps


def make_families(place: Path) -> Iterator[Family]:
    """Random models with a base each, of every architecture, tying, dtype and distance."""
    for architecture, tied, dtype, distance in product(ARCHITECTURES, (True, False), DTYPES, (NEAR, FAR)):
        family = Family(f"{architecture}-{'tied' if tied else 'untied'}", dtype, distance, Path(), ())
        folders = [place / family.name / member for member in ("base", *(f"tuned-{n + 1}" for n in range(MAX_TUNED)))]
        _write_family(folders, architecture, tied, dtype, distance)
        yield family._replace(base=folders[0], tuned=folders[1:])


def _write_family(folders: Sequence[Path], architecture: str, tied: bool, dtype: str, distance: float) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen2Config

    transformers.logging.disable_progress_bar()
    kinds: Mapping[str, Any] = {"llama": LlamaConfig, "gemma": GemmaConfig, "qwen2": Qwen2Config}
    config = kinds[architecture](
        vocab_size=160,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        **({"head_dim": 8} if architecture == "gemma" else {}),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    # norms and biases start as ones and zeros, which would hide faults; −0.0 is its own value
    start = [torch.randn_like(p) * SPREAD + (p.ndim == 1) * 0.5 for p in model.parameters()]
    common = [torch.randn_like(p) for p in start]
    for number, folder in enumerate(folders):
        with torch.no_grad():
            for parameter, weights, shared in zip(model.parameters(), start, common, strict=True):
                own = torch.randn_like(shared)
                delta = (shared + own) * (SPREAD * distance / 2**0.5) if number else torch.zeros_like(shared)
                parameter.copy_(weights + delta)
                parameter.view(-1)[:2] = torch.tensor([-0.0, 0.0])
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        model.float()
        write_tokenizer(folder)


def families_of(row: Row, families: Sequence[Family]) -> list[Family]:
    """Those that a row is compared on: where an order decides, not the near ones, whose deltas are mostly equal."""
    return [family for family in families if row.undecided is None or family.distance == FAR]


def merge_with_mergekit(python: Path, rows: Sequence[Row], families: Sequence[Family], place: Path) -> None:
    """Carry out all rows on all families in one process."""
    jobs = [
        {
            "configuration": row.configuration(
                str(family.base), [str(folder) for folder in family.tuned[: row.num_tuned]], family.dtype
            ),
            "out": str(place / str(number) / family.name),
        }
        for number, row in enumerate(rows)
        for family in families_of(row, families)
    ]
    subprocess.run([python, str(JOBS)], input=json.dumps(jobs), text=True, check=True)


def merge_with_ours(row: Row, family: Family, out: Path) -> None:
    """Carry out a row on a family."""
    from backmerge.checkpoints.reader import Checkpoint
    from backmerge.merging.method import find_method
    from backmerge.merging.recipe import Variant
    from backmerge.merging.to_disk import write_merged

    tuned = [Checkpoint(folder) for folder in family.tuned[: row.num_tuned]]
    models = tuned[0] if len(tuned) == 1 else tuned
    out.parent.mkdir(parents=True, exist_ok=True)
    write_merged(Variant(Checkpoint(family.base), models, find_method(row.method), row.lam, parameters=row.ours), out)


def compare(row: Row, family: Family, ours: Path, theirs: Path, finding: Finding) -> None:
    """Add the differences of two folders to a finding."""
    import torch

    mine, other = tensors_of(ours), tensors_of(theirs)
    operands = [tensors_of(folder) for folder in (family.base, *family.tuned[: row.num_tuned])]
    for name in sorted(set(mine) ^ set(other)):
        if name in mine and DROPPED.get(family.kind) == name:
            finding.num_dropped += 1
            continue
        finding.lacking[f"{'ours' if name in other else 'mergekit'} lacks {name}"] += 1
    for name in sorted(set(mine) & set(other)):
        x, y = mine[name], other[name]
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            finding.lacking[f"{name} is {x.dtype} {tuple(x.shape)}, mergekit's {y.dtype} {tuple(y.shape)}"] += 1
            continue
        base, *tuned = (tensors[name].float() for tensors in operands)
        decided = torch.ones_like(x, dtype=torch.bool)
        if row.undecided is not None:
            for tensor in tuned:
                decided &= ~row.undecided(base, tensor)
        finding.num_tensors += 1
        finding.num_undecided += int((~decided).sum())
        apart = ulps_apart(x, y)[decided & (x.float().abs() > SMALL)]
        finding.ulps = max(finding.ulps, int(apart.max()) if apart.numel() else 0)
        largest = torch.stack([base, *tuned, x.float()]).abs().max(dim=0).values
        off = (x.double() - y.double()).abs() / (largest.double() * torch.finfo(x.dtype).eps)
        off = off[decided & (largest > 0)]
        # a NaN would pass a comparison: it is infinitely far
        worst = float(off.nan_to_num(nan=float("inf")).max()) if off.numel() else 0.0
        finding.operand_ulps = max(finding.operand_ulps, worst)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def found_for(number: int, row: Row, families: Sequence[Family], place: Path) -> dict[str, Finding]:
    """Carry out a row with ours and compare it with what mergekit made of it; the finding by dtype."""
    from backmerge.errors import BackmergeError

    findings = {dtype: Finding() for dtype in DTYPES}
    for family in families_of(row, families):
        ours = place / "ours" / str(number) / family.name
        try:
            merge_with_ours(row, family, ours)
        except BackmergeError as error:
            findings[family.dtype].error = str(error).partition("\n")[0]
            continue
        compare(row, family, ours, place / "theirs" / str(number) / family.name, findings[family.dtype])
    return findings


def line(row: Row, dtype: str, finding: Finding) -> str:
    """A row of the table."""
    lacking = "; ".join(f"{what} ({count}×)" for what, count in finding.lacking.items())
    outcome = finding.error or lacking or ("" if finding.is_expected(row, dtype) else "**unexpected**")
    parameters = ", ".join(f"{name}={value}" for name, value in {"lam": row.lam, **row.ours}.items())
    cells = [
        row.method,
        f"{row.num_tuned}",
        parameters,
        dtype,
        f"{finding.num_tensors}",
        f"{finding.ulps}" if row.relation == "same" else "",  # how far random masks are apart says nothing
        f"{finding.operand_ulps:.2g}" if row.relation == "same" else "",
        f"{finding.num_undecided}",
        row.relation,
        "; ".join(part for part in (outcome, row.reason) if part),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Merge with both, compare, print; exit with 1 where a difference is not expected."""
    names = list(dict.fromkeys(row.method for row in ROWS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--mergekit-python", type=Path, help="an interpreter with mergekit; default: .venv-mergekit's")
    options = parser.parse_args()
    rows = [row for row in ROWS if row.method in options.methods.split(",")]
    if not rows:
        parser.error(f"no such method: {options.methods}; there are {', '.join(names)}")
    python = mergekit_python(options.mergekit_python)
    all_expected = True
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        place = Path(folder)
        families = list(make_families(place / "models"))
        merge_with_mergekit(python, rows, families, place / "theirs")
        print("| method | tuned | ours | dtype | tensors | ulps, x > 1e-4 | ulps of operands | left out | expected | |")
        print("|---|--:|---|---|--:|--:|--:|--:|---|---|")
        for number, row in enumerate(rows):
            for dtype, finding in found_for(number, row, families, place).items():
                all_expected &= finding.is_expected(row, dtype)
                print(line(row, dtype, finding), flush=True)
    dropped = "; ".join(f"{name} of {kind}" for kind, name in DROPPED.items())
    print(f"\nNot compared, for mergekit's templates do not know them and it drops them: {dropped}.")
    sys.exit(not all_expected)


if __name__ == "__main__":
    main()
