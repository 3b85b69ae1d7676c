"""Fill the embedding and head rows of new tokens; old rows stay bit-identical."""
