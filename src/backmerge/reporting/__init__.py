"""What a run found, for people: sentences, tables, plots, the report, the model card."""
