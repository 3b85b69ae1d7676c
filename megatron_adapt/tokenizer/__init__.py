"""A base tokenizer and a corpus to an extended tokenizer whose old ids never move."""
