"""`python -m earthformer_hf.cli`."""

from . import main


if __name__ == "__main__":
    main()
