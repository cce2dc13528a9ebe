"""`python -m ssl_ray` is `ssl-ray`."""

import sys

from ssl_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
