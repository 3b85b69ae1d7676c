"""Measure the rows of a resized model: lengths, neighbours, use, loss, donor and translations.

``python tools/diagnose_vocab.py --base DIR --model DIR --corpora en=FILE ja=FILE --json OUT.json --plots FOLDER``
With ``--donor DIR`` also how far its rows explain the base's, with ``--dictionary FILE`` or ``--parallel FILE`` the
translations that the rows find. The fields of the JSON: ``megatron_adapt/vocab/diagnose.py``.
"""

from megatron_adapt.config import DiagnoseVocab
from megatron_adapt.flags import load_config, run_tool

if __name__ == "__main__":
    config = load_config(DiagnoseVocab)
    from megatron_adapt.evaluate.bits_per_byte import evaluate
    from megatron_adapt.vocab.diagnose import diagnose_vocab

    run_tool(diagnose_vocab, config, evaluate)
