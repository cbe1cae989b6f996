"""``python -m lowmem_flux2``."""

from lowmem_flux2.cli import main

if __name__ == "__main__":
    main()
