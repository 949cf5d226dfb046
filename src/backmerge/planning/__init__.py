"""The settings of a run, and the models that they name."""
