"""`python -m automodel_trainer` is `amt`."""

from automodel_trainer.cli import main

if __name__ == "__main__":
    main()
