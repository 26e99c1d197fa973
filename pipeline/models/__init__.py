"""Models: loading, chat formats, random initialisation, checks of weights, GGUF."""
