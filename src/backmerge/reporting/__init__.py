"""Present a run's results to people: sentences, tables, plots, the report, the model card."""
