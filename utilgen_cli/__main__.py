"""`python -m utilgen_cli` is `utilgen`."""

from .app import main

if __name__ == "__main__":
    main()
