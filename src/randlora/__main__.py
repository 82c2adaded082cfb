"""`python -m randlora` is the `randlora` command."""

from randlora.cli.main import main

if __name__ == "__main__":
    main()
