"""``python -m training`` is ``sparse-transformers``."""

from training.cli import main

if __name__ == "__main__":
    main()
