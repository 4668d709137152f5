"""``python -m invlib.rec_mult``: attack many clients; see `invlib.cli.series`."""

from invlib.cli.series import main

if __name__ == "__main__":
    raise SystemExit(main())
