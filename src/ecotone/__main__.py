"""`python -m ecotone`: the command line."""

from ecotone.cli.main import main

if __name__ == "__main__":
    main()
