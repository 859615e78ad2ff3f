"""What the mismatched response y- is sampled under: one pure function per strategy, over one block of prompt rows.

A strategy reads a block as a table of columns (column name -> one list per column, all of the same length) with at
least `prompt_id`, `messages`, `question_messages`, `context`, `group` and `text` (see `rows.PROMPT_SCHEMA`);
`similar_prompt` also needs `embedding`, a float32 array [rows, dimensions]. DPO
against the sampling policy as reference fits beta * log(pi_theta / pi_ref) to the log-ratio of the density that chosen
responses come from to the density that rejected responses come from. The strategy decides the second density, and with
it which mutual information is maximised (Nam, Li, Jaques, arXiv 2603.19294).

Every strategy gives each row K (`Draw.negatives`) mismatched prompts, different ones as far as it has different ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mipo_ray.conditioning.derangement import classes, derangement
from mipo_ray.config.conditioning import SimilarConfig
from mipo_ray.seeds import stable_seed
from mipo_ray.text.sentences import informative_sentences, sentence_spans, without_sentence

Block = Mapping[str, Any]
Message = dict[str, str]

NO_CONTEXT = "no_context"
UNUSED_CONTEXT = "unused_context"
NO_OTHER_PROMPT = "no_mismatched_prompt"
NO_OTHER_CONTEXT = "no_other_context"
ONE_SENTENCE = "one_sentence"
NO_NEIGHBOUR = "no_similar_prompt"

# Rows of the similarity matrix held at a time: 512 x 4,096 float32 values are 8 MB.
_SIMILARITY_ROWS = 512


@dataclass(frozen=True)
class Draw:
    """What a strategy uses beside the block.

    seed: of every random choice. negatives: K, mismatched prompts of each row. join: puts a context into question
    messages, as the recipe's template says. similar: the neighbours of `similar_prompt`.
    """

    seed: int
    negatives: int
    join: Callable[[list[Message], str], list[Message]]
    similar: SimilarConfig


@dataclass(frozen=True)
class Conditioning:
    """The mismatched side of every row of a block; the lists have one entry per row, with K entries or none.

    mismatched_messages: K conversations that y- is sampled under; [] where the strategy does not apply to the row.
    mismatched_prompt_ids: the rows that they come from; "" where it is no other row.
    partners: indexes inside the block of the rows whose *matched* responses are reused as y-; [] where y- is sampled.
    """

    mismatched_messages: list[list[list[Message]]]
    mismatched_prompt_ids: list[list[str]]
    partners: list[list[int]]


def random_prompt(block: Block, draw: Draw) -> Conditioning:
    """y- ~ pi(. | x'), sampled afresh, where x' is another prompt of the block.

    Over the random choice of x' this is a draw from the marginal pi(y), so DPO fits log pi_ref(y | x) - log pi_ref(y),
    whose mean is the mutual information I(Y; X) between response and whole prompt (context included, where there is
    one).
    """
    return replace(swapped_response(block, draw), partners=[[] for _ in block["prompt_id"]])


def swapped_response(block: Block, draw: Draw) -> Conditioning:
    """y- is the matched response of another prompt x' of the block, reused: half the generation of `random_prompt`.

    A matched response of x' is a draw from pi(. | x'), so the rejected density is the same marginal pi(y) and DPO
    maximises the same I(Y; X). The difference is that the draws are shared: with one response and one negative for each
    prompt every response is chosen once and rejected once, under another prompt.
    """
    partners = _complete(derangement(block["text"], block["group"], draw.seed, draw.negatives))
    return Conditioning(
        mismatched_messages=[[block["messages"][other] for other in row] for row in partners],
        mismatched_prompt_ids=[[block["prompt_id"][other] for other in row] for row in partners],
        partners=partners,
    )


def missing_context(block: Block, draw: Draw) -> Conditioning:
    """y- ~ pi(. | x): the same question x without the user's context c.

    The pointwise quantity that DPO fits is log pi_ref(y | x, c) - log pi_ref(y | x), whose mean is the conditional
    mutual information I(Y; C | X): the model learns to say what depends on the user. Nothing is drawn; K mismatched
    responses are K samples of the same prompt. Does not apply to rows without a context.
    """
    rows = zip(block["context"], block["question_messages"], block["messages"], strict=True)
    return _of_the_row_itself(
        [[question] * draw.negatives if context and question != own else [] for context, question, own in rows]
    )


def random_context(block: Block, draw: Draw) -> Conditioning:
    """y- ~ pi(. | x, c'): the same question x with the context c' of another user of the block.

    Over the random choice of c' this is a draw from pi(y | x), the answer to the question whoever asks it, so DPO fits
    log pi_ref(y | x, c) - log pi_ref(y | x) and maximises I(Y; C | X), as `missing_context` does; but y- is an answer
    to *some* user, so chosen and rejected do not differ in whether a user is spoken to at all. Does not apply to rows
    without a context, and never pairs users of one group.
    """
    with_context = [index for index, context in enumerate(block["context"]) if context]
    drawn = derangement(
        [" ".join(block["context"][index].split()) for index in with_context],
        [block["group"][index] for index in with_context],
        draw.seed,
        draw.negatives,
    )
    messages: list[list[list[Message]]] = [[] for _ in block["prompt_id"]]
    prompt_ids: list[list[str]] = [[] for _ in block["prompt_id"]]
    for index, partners in zip(with_context, _complete(drawn), strict=True):
        others = [with_context[other] for other in partners]
        joined = [draw.join(block["question_messages"][index], block["context"][other]) for other in others]
        if block["messages"][index] not in joined:
            messages[index] = joined
            prompt_ids[index] = [block["prompt_id"][other] for other in others]
    return Conditioning(messages, prompt_ids, partners=[[] for _ in messages])


def partial_prompt(block: Block, draw: Draw) -> Conditioning:
    """y- ~ pi(. | x-): the prompt with one informative sentence of its last message left out, drawn with the seed.

    The rejected density is the policy's answer to a prompt that lacks one piece of information, so DPO fits
    log pi_ref(y | x) - log pi_ref(y | x-): the part of the mutual information I(Y; X) that the sentence carries. A
    hard negative, near the prompt. K mismatched prompts leave out K different sentences as far as there are so many.
    Does not apply to prompts of one sentence, or without an informative one.
    """
    mismatched = []
    for prompt_id, messages in zip(block["prompt_id"], block["messages"], strict=True):
        *earlier, last = messages
        sentences = informative_sentences(last["content"]) if len(sentence_spans(last["content"])) > 1 else []
        order = np.random.default_rng(stable_seed(draw.seed, prompt_id)).permutation(sentences)
        left_out = [int(order[index % len(order)]) for index in range(draw.negatives)] if sentences else []
        shortened = [without_sentence(last["content"], sentence) for sentence in left_out]
        mismatched.append([[*earlier, {**last, "content": content}] for content in shortened])
    return _of_the_row_itself(mismatched)


def similar_prompt(block: Block, draw: Draw) -> Conditioning:
    """y- ~ pi(. | x'), where x' is one of the nearest other prompts of the block: a hard negative.

    The rejected density is the answer to prompts *like* x, so DPO fits the part of I(Y; X) that tells a prompt from its
    neighbourhood: log pi_ref(y | x) - log pi_ref(y | neighbourhood of x). x' is
    drawn from the `similar.neighbours` prompts with the largest cosine similarity inside the band [`min_similarity`,
    `max_similarity`]; above it prompts are taken for paraphrases. Similarities are those of embeddings without the
    block's mean: 0 is how alike two average prompts are. Does not apply to rows with fewer than K prompts of
    different text in the band.

    The search is exact: a matrix product over the block, block rows x block rows x dimensions multiplications. For a
    fixed block size the cost of a data set grows linearly with its rows.
    """
    random = np.random.default_rng(draw.seed)
    text_class = classes(block["text"])
    band = draw.similar
    partners = []
    for _, similarity, admissible in _similarities(block):
        inside = admissible & (similarity >= band.min_similarity) & (similarity <= band.max_similarity)
        nearest = _nearest(similarity, inside, text_class, max(band.neighbours, draw.negatives))
        enough = len(nearest) >= draw.negatives
        partners.append(random.choice(nearest, draw.negatives, replace=False).tolist() if enough else [])
    return Conditioning(
        mismatched_messages=[[block["messages"][other] for other in row] for row in partners],
        mismatched_prompt_ids=[[block["prompt_id"][other] for other in row] for row in partners],
        partners=[[] for _ in partners],
    )


def nearest_similarities(block: Block, row: int, most: int = 3) -> list[float]:
    """The largest cosine similarities of a row's prompt to those that it could be mismatched with, largest first."""
    _, similarity, admissible = next(item for item in _similarities(block) if item[0] == row)
    return sorted((float(value) for value in similarity[admissible]), reverse=True)[:most]


@dataclass(frozen=True)
class ConditioningStrategy:
    """A strategy, what it needs of the prompt rows, and the reason why it does not apply to a row."""

    condition: Callable[[Block, Draw], Conditioning]
    needs_context: bool
    needs_mismatch: bool
    impossible: str


STRATEGIES: dict[str, ConditioningStrategy] = {
    "random_prompt": ConditioningStrategy(random_prompt, False, True, NO_OTHER_PROMPT),
    "swapped_response": ConditioningStrategy(swapped_response, False, True, NO_OTHER_PROMPT),
    "missing_context": ConditioningStrategy(missing_context, True, False, UNUSED_CONTEXT),
    "random_context": ConditioningStrategy(random_context, True, False, NO_OTHER_CONTEXT),
    "partial_prompt": ConditioningStrategy(partial_prompt, False, False, ONE_SENTENCE),
    "similar_prompt": ConditioningStrategy(similar_prompt, False, True, NO_NEIGHBOUR),
}


def _of_the_row_itself(mismatched: list[list[list[Message]]]) -> Conditioning:
    """Mismatched prompts that are made of the row's own prompt."""
    return Conditioning(mismatched, [[""] * len(row) for row in mismatched], [[] for _ in mismatched])


def _complete(partners: np.ndarray) -> list[list[int]]:
    """The partners of rows that have all K of them, [] for the others."""
    return [row if min(row) >= 0 else [] for row in partners.tolist()]


def _nearest(similarity: np.ndarray, inside: np.ndarray, text_class: np.ndarray, wanted: int) -> np.ndarray:
    """At most `wanted` rows that are `inside`, the most similar first; rows of equal text are one neighbour."""
    candidates = np.flatnonzero(inside)
    looked_at = 4 * wanted  # sorting a whole block for every row would cost more than the similarities
    while True:
        if looked_at < len(candidates):
            found = candidates[np.argpartition(-similarity[candidates], looked_at)[:looked_at]]
        else:
            found = candidates
        found = found[np.lexsort((found, -similarity[found]))]
        _, first = np.unique(text_class[found], return_index=True)
        nearest = found[np.sort(first)][:wanted]
        if len(nearest) == wanted or len(found) == len(candidates):
            return nearest
        looked_at *= 4


def _similarities(block: Block) -> Any:
    """(row, similarity to each row of the block, float32 [rows], which are admissible, bool [rows]), in order."""
    embeddings: np.ndarray = np.asarray(block["embedding"], dtype=np.float32)
    # Mean hidden states of a language model share one large direction (here every two prompts have a cosine above 0.9,
    # and the nearest are those of like form); what is left without it tells topics apart.
    embeddings = embeddings - embeddings.mean(axis=0)
    embeddings = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    text_class, group_class = classes(block["text"]), classes(block["group"])
    grouped = np.array([group != "" for group in block["group"]], dtype=bool)
    for start in range(0, len(embeddings), _SIMILARITY_ROWS):
        # Rounded, so that the noise of another processor does not reorder neighbours.
        chunk = np.round(embeddings[start : start + _SIMILARITY_ROWS] @ embeddings.T, 4)
        for row, similarity in enumerate(chunk, start=start):
            other_group = (group_class != group_class[row]) | ~grouped
            yield row, similarity, (text_class != text_class[row]) & other_group
