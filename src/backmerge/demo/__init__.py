"""The embedded tiny aligned model, its language, and the experiment that shows the method on it."""

from pathlib import Path

EXPERIMENT = Path(__file__).with_name("experiment.yaml")

# what --fast changes: one seed and fewer λs
FAST = ("finetune.seeds=[42]", "merge.0.lam=[0.3, 0.5]")


def model_directory() -> Path:
    """The embedded model's folder, a normal Hugging Face directory."""
    return Path(__file__).with_name("model")
