"""`python -m backmerge`."""

from backmerge.cli import main

if __name__ == "__main__":
    main()
