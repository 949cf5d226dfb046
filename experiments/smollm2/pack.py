"""Pack what a finished run found, without any model's text: `python experiments/smollm2/pack.py RUN FILE [OLD=NEW]...`.

FILE.tar.xz holds results, settings, values and verdicts, from which `backmerge report` makes every table and figure
again. OLD=NEW replaces a local path by a name. Weights, prompts and answers are left out.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

FILES = ("results.json", "samples.json", "experiment.yaml", "looks.jsonl", "sessions.jsonl")
RECORDS = ("records/values.jsonl", "records/verdicts.jsonl")


def main(run: Path, file: Path, replaced: dict[str, str]) -> None:
    """Write the archive, the same bytes for the same run."""
    with tarfile.open(file, "w:xz", preset=9) as archive:
        for name in (*FILES, *RECORDS):
            text = (run / name).read_text(encoding="utf-8")
            for old, new in replaced.items():
                text = text.replace(old, new)
            data = text.encode()
            member = tarfile.TarInfo(f"{file.name.partition('.')[0]}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), dict(pair.split("=", 1) for pair in sys.argv[3:]))
