"""``python -m stretto``: the same as the command ``stretto``."""

from stretto.cli import main

if __name__ == "__main__":
    main()
