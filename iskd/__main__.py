"""`python -m iskd COMMAND ...` is `iskd COMMAND ...`."""

from iskd.cli import main

if __name__ == "__main__":
    main()
