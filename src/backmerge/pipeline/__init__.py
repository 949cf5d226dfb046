"""The stages of an experiment in their order: fine-tune, sweep, choose, write, confirm, report."""
