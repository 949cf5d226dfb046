"""Files with harmful and harmless prompts: only the side that is asked for counts; an unknown label is asked about."""

from __future__ import annotations

from pathlib import Path

import pytest

from backmerge.benchmarks.files import from_file
from backmerge.benchmarks.protocol import BenchmarkSettings
from backmerge.errors import DataError

FILES = {
    "XSTest's labels": "prompt,type,label\nhow to fold,homonyms,safe\nhow to tear,contrast_homonyms,unsafe\n",
    "XSTest's types": "prompt,type\nhow to fold,homonyms\nhow to tear,contrast_homonyms\n",
    "words": "Goal,type\nhow to fold,benign\nhow to tear,harmful\n",
    "a truth value": "prompt,is_harmful\nhow to fold,False\nhow to tear,True\n",
    "the other way round": "prompt,safe\nhow to fold,1\nhow to tear,0\n",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_each_side_counts_its_own(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Harmful prompts are for safety, harmless ones for over-refusal, and what is left out is said."""
    file = tmp_path / "mixed.csv"
    file.write_text(content)
    assert [e.prompt for e in from_file(file, "safety").examples] == ["how to tear"]
    assert [e.prompt for e in from_file(file, "over_refusal").examples] == ["how to fold"]
    assert "only 1 of its 2 prompts are used" in capsys.readouterr().err


def test_an_unknown_label_is_asked_about(tmp_path: Path) -> None:
    """The values are named, and so is the option that says what they mean."""
    file = tmp_path / "mixed.csv"
    file.write_text("prompt,label\nhow to fold,A\nhow to tear,B\n")
    with pytest.raises(DataError, match="label A, B harmful or harmless") as caught:
        from_file(file, "safety")
    assert "options.harmful" in (caught.value.remedy or "")
    settings = BenchmarkSettings(name=str(file), options={"harmful": ["B"]})
    assert [e.prompt for e in from_file(file, "safety", settings).examples] == ["how to tear"]


def test_file_of_harmless_rows_is_refused_for_safety(tmp_path: Path) -> None:
    """A file whose labels are all harmless has nothing for safety."""
    file = tmp_path / "mixed.csv"
    file.write_text("prompt,label\nhow to fold,safe\n")
    with pytest.raises(DataError, match="no harmful prompts"):
        from_file(file, "safety")


def test_types_that_are_categories_stay_categories(tmp_path: Path) -> None:
    """Without words that say harmful or harmless all rows count."""
    file = tmp_path / "own.csv"
    file.write_text("prompt,type\nhow to fold,paper\nhow to tear,cloth\n")
    assert [e.category for e in from_file(file, "safety").examples] == ["paper", "cloth"]
