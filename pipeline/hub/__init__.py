"""Download from and upload to the Hugging Face hub."""
