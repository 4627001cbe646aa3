def normalise(text: str) -> str:
    """What exact match compares: blanks at the ends stripped, lower case, periods at the end removed.

    This is LLaVA's own treatment of GQA answers (evaluation §1); nothing inside the text changes.
    """
    return text.strip().lower().rstrip(".").strip()


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if the normalised texts are equal, else 0.0."""
    return float(normalise(prediction) == normalise(answer))
