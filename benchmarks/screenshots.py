"""Pictures of a run's report for the documentation: `python -m benchmarks.screenshots RUN OUT`.

Writes report-{desktop,phone}-{light,dark}.png, from the repository's root, with Debian's chromium.
"""

import argparse
import tempfile
from pathlib import Path

from tests.reporting.chromium import Chromium

SIZES = {"desktop": (1280, 1200), "phone": (390, 1500)}  # CSS pixels


def main() -> None:
    """Open the report four times, and keep what is seen first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("out", type=Path, help="where the pictures go")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, Chromium(Path(profile)) as browser:
        for device, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                browser.look_as(width, height, is_dark=scheme == "dark", is_phone=device == "phone")
                browser.open(asked.run / "report.html")
                file = asked.out / f"report-{device}-{scheme}.png"
                file.write_bytes(browser.picture())
                print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
