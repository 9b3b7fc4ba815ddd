"""`python -m vitcli` is the command `vitcli`."""

from vitcli.cli.app import main

if __name__ == "__main__":
    main()
