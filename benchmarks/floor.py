"""The least that a merge must do: read every input once, write every output and wait until the disk has it.

Run as its own process, by benchmarks.merge: `python floor.py OUT NUM_OUTPUTS FOLDER ...`. Each output has the
size of the first folder's weights. It reuses one buffer, and imports nothing that takes time.
"""

import os
import sys
from pathlib import Path

BUFFER = 8 * 2**20  # bytes


def main(out: Path, num_outputs: int, folders: list[Path]) -> None:
    """Read the folders' weights, and write as many bytes as the first holds, so many times."""
    buffer = bytearray(BUFFER)
    for folder in folders:
        for file in folder.glob("*.safetensors"):
            with file.open("rb", buffering=0) as source:
                while source.readinto(buffer):
                    pass
    size = sum(file.stat().st_size for file in folders[0].glob("*.safetensors"))
    out.mkdir()
    for number in range(num_outputs):
        with (out / str(number)).open("wb", buffering=0) as target:
            left = size
            while left:
                left -= target.write(memoryview(buffer)[:left])
            os.fsync(target.fileno())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [Path(folder) for folder in sys.argv[3:]])
