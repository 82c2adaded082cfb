"""`python -m randlora` is the `randlora` command."""

from randlora_cli import main

if __name__ == "__main__":
    main()
