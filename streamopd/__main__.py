"""`python -m streamopd` is `streamopd`."""

from streamopd.cli import main

if __name__ == "__main__":
    main()
