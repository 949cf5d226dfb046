"""Commands that only merge or compare: each a function that the command line shows, with light imports."""
