"""`python -m ssl_ray` is `ssl-ray`."""

from ssl_ray.cli import entry

if __name__ == "__main__":
    entry()
