"""Raw text to clean documents, split into training and validation."""
