"""A Space of the Hugging Face hub: the web page of `backmerge chat` on the embedded model's own demo run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from backmerge.generation.protocol import EngineSettings, Sampling
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.pipeline.chat_page import page_of, serve
from backmerge.pipeline.chatting import Chat, trio_of_run

RUN = Path(os.environ.get("BACKMERGE_RUN", "demo"))


def main() -> None:
    """Make the run unless it is there (minutes on two cores), and serve its page to the Space's visitors."""
    if not (RUN / "results.json").is_file():
        subprocess.run([sys.executable, "-m", "backmerge", "demo", "--out", str(RUN)], check=True)
    engine = TransformersEngine(EngineSettings(batch_size=1))
    session = Chat(engine, trio_of_run(RUN), Sampling(max_new_tokens=64))
    # a Space's own proxy is what reaches this address
    serve(page_of(session, engine.stream, RUN), host="0.0.0.0", port=int(os.environ.get("PORT", "7860")))  # noqa: S104


if __name__ == "__main__":
    main()
