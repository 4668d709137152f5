"""``python -m invlib.reconstruct_image``: reconstruct one client's images; see `invlib.cli.reconstruct`."""

from invlib.cli.reconstruct import main

if __name__ == "__main__":
    raise SystemExit(main())
