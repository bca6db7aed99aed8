"""Which texts are alike: BM25 on words, or the cosine of sentence embeddings.

A ranking is a function `rank(query, count)`: the indices of the `count` texts most like text number `query`, best
first, ties in the order of the texts. It may name the query itself; `contexts.nearest_donors` leaves that out. With a
`pool`, indices in order, only those texts are named: all against all would take the square of their number.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np

from unisd_jax.errors import UserError

Ranking = Callable[[int, int], list[int]]

# Similarities of this many queries to all texts are held at once: 10 MB for 10,000 texts.
QUERIES_AT_ONCE = 256


def bm25_ranking(texts: Sequence[str], pool: Sequence[int] | None = None) -> Ranking:
    """Ranks by BM25 (Lucene's form) over lower-cased words; needs no model.

    Words of one character count too: in short questions they are often the numbers that matter.
    """
    # Imported here: the package calls jax while it loads, which would claim the accelerator for `import unisd_jax`.
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)

    words = bm25s.tokenize(list(texts), token_pattern=r"(?u)\b\w+\b", stopwords="en", show_progress=False)
    own = range(len(texts)) if pool is None else pool
    if not any(words.ids[text] for text in own):
        return lambda query, count: list(own[:count])
    index = bm25s.BM25()
    index.index(words._replace(ids=[words.ids[text] for text in own]), show_progress=False)

    def rank(query: int, count: int) -> list[int]:
        return [own[place] for place in best(index.get_scores_from_ids(words.ids[query]), count)]

    return rank


def minilm_ranking(texts: Sequence[str], model: str = "all-MiniLM-L6-v2", pool: Sequence[int] | None = None) -> Ranking:
    """Ranks by the cosine of sentence embeddings, as the release does (its retrieval uses this model).

    Raises:
      UserError: the optional package is not installed, or it cannot load the model.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(
            "teacher.contexts.encoder=minilm needs sentence-transformers, which is not installed: "
            "pip install 'unisd_jax[retrieval]', or set teacher.contexts.encoder=bm25"
        ) from None
    try:
        encoder = SentenceTransformer(model)
    except (OSError, ValueError) as error:
        raise UserError(
            f"sentence encoder {model!r} cannot be loaded ({error}); set teacher.contexts.encoder_path to a "
            "model of the hub or a folder, or teacher.contexts.encoder=bm25"
        ) from None
    vectors = encoder.encode(list(texts), batch_size=256, normalize_embeddings=True, show_progress_bar=False)
    return cosine_ranking(np.asarray(vectors, np.float32), pool)


def cosine_ranking(vectors: np.ndarray, pool: Sequence[int] | None = None) -> Ranking:
    """Ranks by the inner product of unit vectors [N, D], a block of queries at a time; queries in order are fastest."""
    block, scores = -1, np.empty((0, 0), np.float32)
    own = np.arange(len(vectors)) if pool is None else np.asarray(pool)
    lenders = vectors[own]

    def rank(query: int, count: int) -> list[int]:
        nonlocal block, scores
        if query // QUERIES_AT_ONCE != block:
            block = query // QUERIES_AT_ONCE
            scores = vectors[block * QUERIES_AT_ONCE : (block + 1) * QUERIES_AT_ONCE] @ lenders.T
        return own[best(scores[query % QUERIES_AT_ONCE], count)].tolist()

    return rank


def best(scores: np.ndarray, count: int) -> list[int]:
    """Indices of the `count` largest of `scores` [N], largest first, equal ones in order of index."""
    count = min(count, len(scores))
    if count == 0:
        return []
    lowest = np.partition(scores, -count)[-count]
    above = np.flatnonzero(scores > lowest)
    # Only as many of the equal ones as there is room for, the first of them: partition alone would take any.
    chosen = np.concatenate([above, np.flatnonzero(scores == lowest)[: count - len(above)]])
    return chosen[np.lexsort((chosen, -scores[chosen]))].tolist()
