"""`python -m adapterkit`: the command line without the script on the path."""

from __future__ import annotations

from adapterkit.cli.main import main

if __name__ == "__main__":
    main()
