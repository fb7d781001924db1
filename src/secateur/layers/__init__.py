"""The layers of converted models, and how transformers puts them in place when it opens a folder."""
