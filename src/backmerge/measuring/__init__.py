"""Answers, verdicts and scores: each is made from the previous one and stored as units of the run."""
