"""The memoriser control: a nearest-neighbour retrieval baseline.

It has memorised every training row and learned no rule: a question is answered with the answer of the training
question that looks most like it. A tuned model that beats it only on 'seen' rows may have memorised; one that beats it
on 'unseen' rows has learned something that is in no single training row. Exact match and form accuracy of this
baseline are near zero on unseen lexemes; its chrF++ is not, because answers share their wording.
"""

from collections.abc import Sequence

from stoney_rl.errors import StoneyError
from stoney_rl.text import normalize

# char_wb pads each word with a space, so that an affix at a word's edge is its own n-gram.
NGRAMS = (2, 5)
_BLOCK = 64  # prompts compared at a time: 64 x 45,000 rows of float64 is 23 MB


def retrieve_answers(train_rows: Sequence, prompts: Sequence) -> list[str]:
    """For each prompt the answer of the nearest training row, by cosine of character 2-5-gram TF-IDF of the question.

    ``train_rows`` have ``question`` and ``answer`` (``data.Row``); ``prompts`` are question strings or chat messages
    (the last user message is the question). Ties go to the earlier training row. A prompt that shares no n-gram with
    any training question gets an empty string. Raises StoneyError if there is no training row or a prompt is neither.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not train_rows:
        raise StoneyError("retrieval baseline: no training rows; pass the rows of the train split")
    questions = [question_of(prompt) for prompt in prompts]
    if not questions:
        return []
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=NGRAMS, preprocessor=lambda text: text.lower())
    train = vectorizer.fit_transform([normalize(row.question) for row in train_rows])
    asked = vectorizer.transform([normalize(question) for question in questions])
    answers = []
    for start in range(0, len(questions), _BLOCK):
        similarity = (asked[start : start + _BLOCK] @ train.T).toarray()  # [prompt, training row]; rows have norm 1
        nearest = similarity.argmax(axis=1)
        answers += [train_rows[row].answer if similarity[i, row] > 0 else "" for i, row in enumerate(nearest.tolist())]
    return answers


def question_of(prompt) -> str:
    """The question in a prompt: the string itself, or the last user message of a list of chat messages."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, (list, tuple)) and all(isinstance(message, dict) for message in prompt):
        for message in reversed(prompt):
            if message.get("role") == "user" and isinstance(message.get("content"), str):
                return message["content"]
    raise StoneyError(f"prompt: expected a string or chat messages with a user message, got {str(prompt)[:60]!r}")
