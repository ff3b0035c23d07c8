"""`python -m sslcli`: what the launcher starts; the same as `ssl`."""

from sslcli.cli import main

if __name__ == "__main__":
    main()
