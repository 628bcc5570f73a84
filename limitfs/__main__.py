"""`python -m limitfs` is `limitfs`."""

from limitfs.cli import main

if __name__ == "__main__":
    main(prog_name="limitfs")
