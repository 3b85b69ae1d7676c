"""Append pieces that were learned elsewhere, so that the files reach every one of them.

A piece of another tokenizer may not come out of the merges: the base cuts its text otherwise, or a filter refused one
of its parts. It is completed, as ruadapt continues the base's own cuts (Tikhomirov and Chernyshev 2024,
arXiv:2412.21140): the tokens it falls into are joined one by one from the left, within characters first. Joints count
towards the size and get the last ids: merging after all others, they keep no other piece from coming out. A piece that
needs a joint the filters refuse is dropped.

1. ``Choice.take`` takes the first of the ranked pieces that the filters accept, with their joints.
2. ``append_complete`` writes them, looks which are unreachable, has them completed, and chooses again.

Costs: a few rounds, each of which writes and reads the files: 3 s for 32,000 pieces.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import accumulate
from pathlib import Path

from megatron_adapt.tokenizer.accept import Acceptance
from megatron_adapt.tokenizer.append import write_extended
from megatron_adapt.tokenizer.check import find_unreachable
from megatron_adapt.tokenizer.pieces import SPACE, Kind, LoadedTokenizer, piece_bytes, read_tokenizer
from megatron_adapt.tokenizer.words import strip_tokenizer

_logger = logging.getLogger(__name__)


class Choice:
    """Which of the ranked pieces are appended; pieces are bytes as the base spells them."""

    def __init__(
        self,
        kind: Kind,
        accept: Acceptance,
        ranked: Sequence[bytes],
        *,
        order: Sequence[bytes],
        rare: AbstractSet[bytes],
        num_pieces: int,
    ) -> None:
        """Take the candidates.

        Args:
            kind: family of the base.
            accept: what may become a piece.
            ranked: the candidates, the most wanted first.
            order: the same in the order of the ids they would get; parts stand before what they make.
            rare: those that are seen too rarely.
            num_pieces: how many to take.
        """
        self.reasons: Counter[str] = Counter()
        "What became of the candidates in the last choice."
        self._kind, self._accept, self._ranked, self._rare = kind, accept, ranked, rare
        self._num_pieces = num_pieces
        self._places = {piece: place for place, piece in enumerate(order)}
        self._refused: dict[bytes, str | None] = {}
        self._joints: dict[bytes, list[bytes]] = {}
        self._lost: set[bytes] = set()

    def take(self) -> list[bytes]:
        """Return the pieces in the order of their ids, the joints last."""
        chosen: set[bytes] = set()
        joints: dict[bytes, None] = {}
        self.reasons.clear()
        for piece in self._ranked:
            if len(chosen) + len(joints) == self._num_pieces:
                break
            if piece in joints:
                continue
            missing = [joint for joint in self._joints.get(piece, ()) if joint not in chosen and joint not in joints]
            reason = self._refuse(piece)
            if reason is None and len(chosen) + len(joints) + len(missing) >= self._num_pieces:
                reason = "no room for its joints"
            self.reasons[reason or "accepted"] += 1
            if reason is None:
                chosen.add(piece)
                joints.update(dict.fromkeys(missing))
        self.reasons.update({"joint": len(joints)} if joints else {})
        return [*sorted(chosen, key=self._places.__getitem__), *joints]

    def _refuse(self, piece: bytes) -> str | None:
        if piece in self._rare:
            return "rare"
        if self._lost.intersection((piece, *self._joints.get(piece, ()))):
            return "unreachable"
        if piece not in self._refused:
            self._refused[piece] = self._accept.refuse(piece)
        return self._refused[piece]

    def complete(self, piece: bytes, tokens: list[bytes]) -> None:
        """Join the tokens that an unreachable piece falls into; drop the piece if that failed or is not allowed."""
        joints = _list_joints(tokens, self._kind)[:-1]
        if piece in self._joints or any(map(self._accept.refuse, joints)):
            self._lost.add(piece)
        else:
            self._joints[piece] = joints


def _list_joints(tokens: list[bytes], kind: Kind) -> list[bytes]:
    """List what joining tokens from the left gives, within characters first; the last is all of them."""
    groups: list[list[bytes]] = []
    for token in tokens:
        if groups and _is_cut(b"".join(groups[-1])):
            groups[-1].append(token)
        else:
            groups.append([token])
    # A character that SentencePiece lacks becomes a piece at once: its bytes do not merge.
    first = -1 if kind == "sentencepiece" else 1
    joints = [joined for group in groups if len(group) > 1 for joined in list(accumulate(group))[first:]]
    if len(groups) > 1:
        joints += list(accumulate(b"".join(group) for group in groups))[1:]
    return joints


def _is_cut(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return True
    return False


def append_complete(base: LoadedTokenizer, choice: Choice, folder: Path) -> list[str]:
    """Append the chosen pieces to ``base`` so that the written files reach every one of them.

    Args:
        base: the tokenizer to extend.
        choice: the candidates.
        folder: an existing folder.

    Returns:
        The pieces as the files spell them; none if no candidate is left.
    """
    while pieces := choice.take():
        spelled = write_extended(base, pieces, folder)
        made = read_tokenizer(folder)
        unreachable = find_unreachable(made, spelled)
        if not unreachable:
            return spelled
        _logger.info("%d pieces came out unreachable; completing them or choosing without them", len(unreachable))
        bare, surfaces = strip_tokenizer(made), piece_bytes(made)
        if base.kind == "sentencepiece":
            surfaces = [surface.replace(b" ", SPACE.encode()) for surface in surfaces]
        for piece, text in zip(pieces, spelled, strict=True):
            if text in unreachable:
                choice.complete(piece, [surfaces[index] for index in bare.encode(text).ids])
    return []
