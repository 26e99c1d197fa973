"""The reader of model text, figures with their intervals, charts."""
