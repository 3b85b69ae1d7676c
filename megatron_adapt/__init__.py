"""Take a pretrained Llama-family model to a new language without losing the old one.

The pipeline is the architecture; every stage is a folder, a config class and a tool:
corpus -> tokenizer -> vocab -> checkpoint -> data -> train -> export -> evaluate.
"""

__version__ = "0.1.0"
