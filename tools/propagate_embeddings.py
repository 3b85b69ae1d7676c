"""Give an instruct model the vocabulary that its base model learned (Learned Embedding Propagation).

``python tools/propagate_embeddings.py --base DIR --adapted DIR --instruct DIR --method conversion --output DIR``
"""

from megatron_adapt.config import PropagateEmbeddings
from megatron_adapt.flags import load_config, run_tool

if __name__ == "__main__":
    config = load_config(PropagateEmbeddings)
    from megatron_adapt.vocab.propagate import propagate_embeddings

    run_tool(propagate_embeddings, config)
