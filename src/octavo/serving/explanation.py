"""What a token was drawn from: the model's own distribution, and what each filter did to it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.generating.sampling import filters
from octavo.generating.writing import Slot
from octavo.text.tokenizer import Tokenizer

ALTERNATIVES = 10


def explain(
    logits: NDArray[np.float32], slot: Slot, token: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """How ``token`` came to follow ``slot.ids``, from the model's logits (V,) there.

    ``p`` is the model's probability, ``q`` the one drawn with. ``cut`` says of each filter how many
    tokens it ruled out and the sum of their p; an alternative's names the filter that ruled it out.
    """
    cut: dict[str, dict[str, float]] = {}
    by = np.full(logits.size, "", dtype=object)
    (_, now), *filtered = filters(logits, slot.ids, slot.sampling, slot.prompt_length)
    p = _softmax(now)
    for name, after in filtered:
        gone = (after == -np.inf) & (now > -np.inf)
        if gone.any():
            by[gone] = name
            cut[name] = {"tokens": int(gone.sum()), "p": float(p[gone].sum())}
        now = after
    q = _softmax(now)
    best = np.argsort(-p, kind="stable")[:ALTERNATIVES].tolist()

    def about(each: int) -> dict[str, Any]:
        text = tokenizer.decode([each])
        return {"id": each, "text": text, "p": float(p[each]), "q": float(q[each])}

    alternatives = [{**about(each), "cut": by[each] or None} for each in best]
    return {**about(token), "alternatives": alternatives, "cut": cut}


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
