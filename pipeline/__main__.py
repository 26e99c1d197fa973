"""python -m pipeline COMMAND: see cli/main.py."""

from pipeline.cli.main import main

if __name__ == "__main__":
    main()
