"""Answers, verdicts and scores, each made from the one before and kept as units of the run."""
