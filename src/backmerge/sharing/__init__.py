"""What goes to others: models to the hub, results to a tracker; never prompts, answers or records."""
